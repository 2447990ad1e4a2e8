"""`python -m workers.scheduler --bootstrap-fd N`, started by the launcher."""

from workers.process import run_worker
from workers.scheduler.config import SchedulerBootstrap
from workers.scheduler.worker import run

if __name__ == "__main__":
    run_worker(SchedulerBootstrap, run)
