from workers.detokenizer.config import DetokenizerBootstrap
from workers.detokenizer.worker import run
from workers.process import run_worker

run_worker(DetokenizerBootstrap, run)
