"""The HTTP process: `python -m pipeline.http --bootstrap-fd N`, started by the launcher."""

import pipeline.environment.own_workers  # noqa: F401
from pipeline.http.config import HttpBootstrap
from pipeline.http.worker import run
from workers.process import run_worker

run_worker(HttpBootstrap, run)
