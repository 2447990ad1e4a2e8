from workers.process import run_worker
from workers.tokenizer.config import TokenizerBootstrap
from workers.tokenizer.worker import run

run_worker(TokenizerBootstrap, run)
