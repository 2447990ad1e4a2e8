from functools import partial

from tests.unit.fake_workers.role import live
from workers.gpu.config import GpuBootstrap
from workers.process import run_worker

if __name__ == "__main__":
    run_worker(GpuBootstrap, partial(live, bind=[], connect=[], num_blocks=100))
