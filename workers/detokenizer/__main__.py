from workers.detokenizer.config import DetokenizerBootstrap
from workers.detokenizer.worker import run
from workers.model_tokenizer.loading import hide_torch
from workers.process import run_worker

hide_torch()
run_worker(DetokenizerBootstrap, run)
