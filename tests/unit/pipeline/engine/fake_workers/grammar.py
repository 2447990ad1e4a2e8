from functools import partial

from tests.unit.pipeline.engine.fake_workers.role import live
from workers.grammar.config import GrammarBootstrap
from workers.process import run_worker

if __name__ == "__main__":
    run_worker(GrammarBootstrap, partial(live, bind=[], connect=["schedule"]))
