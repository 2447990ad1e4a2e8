from workers.process import run_worker
from workers.tokenizer.config import TokenizerBootstrap
from workers.tokenizer.worker import run
from workers.tokenizer_files import hide_torch

hide_torch()
run_worker(TokenizerBootstrap, run)
