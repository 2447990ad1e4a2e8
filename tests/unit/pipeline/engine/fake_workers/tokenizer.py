from functools import partial

from tests.unit.pipeline.engine.fake_workers.role import live
from workers.process import run_worker
from workers.tokenizer.config import TokenizerBootstrap

if __name__ == "__main__":
    run_worker(TokenizerBootstrap, partial(live, bind=[], connect=["tokenize", "schedule"], eos_token_id=7))
