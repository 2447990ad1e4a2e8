"""`python -m workers.gpu`: started by the launcher."""

from workers.gpu.config import GpuBootstrap
from workers.gpu.worker import prepare, run
from workers.process import run_worker

run_worker(GpuBootstrap, run, prepare)
