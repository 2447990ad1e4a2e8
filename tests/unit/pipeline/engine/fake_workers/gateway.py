from functools import partial

from tests.unit.pipeline.engine.fake_workers.role import live
from workers.gateway.config import GatewayBootstrap
from workers.process import run_worker

if __name__ == "__main__":
    run_worker(
        GatewayBootstrap,
        partial(live, bind=["tokenize", "deliver"], connect=["schedule", "detokenize"]),
    )
