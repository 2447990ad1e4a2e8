from functools import partial

from tests.unit.pipeline.engine.fake_workers.role import live
from workers.process import run_worker
from workers.scheduler.config import SchedulerBootstrap

if __name__ == "__main__":
    run_worker(SchedulerBootstrap, partial(live, bind=["schedule"], connect=["detokenize"]))
