from functools import partial

import msgspec

from tests.unit.pipeline.engine.fake_workers.role import live
from workers.bootstrap import WorkerBootstrap
from workers.process import run_worker


class HttpBootstrap(msgspec.Struct):
    """Of a front end that is no package of `workers`."""

    worker: WorkerBootstrap


if __name__ == "__main__":
    run_worker(HttpBootstrap, partial(live, bind=[], connect=[]))
