from functools import partial

from tests.unit.pipeline.engine.fake_workers.role import live
from workers.detokenizer.config import DetokenizerBootstrap
from workers.process import run_worker

if __name__ == "__main__":
    run_worker(DetokenizerBootstrap, partial(live, bind=["detokenize"], connect=["schedule", "deliver"]))
