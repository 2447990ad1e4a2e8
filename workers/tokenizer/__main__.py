from workers.model_tokenizer.loading import hide_torch
from workers.process import run_worker
from workers.tokenizer.config import TokenizerBootstrap
from workers.tokenizer.worker import run

hide_torch()
run_worker(TokenizerBootstrap, run)
