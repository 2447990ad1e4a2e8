from workers.detokenizer.config import DetokenizerBootstrap
from workers.detokenizer.worker import run
from workers.process import run_worker
from workers.tokenizer_files import hide_torch

hide_torch()
run_worker(DetokenizerBootstrap, run)
