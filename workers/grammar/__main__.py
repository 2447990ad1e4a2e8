from workers.grammar.config import GrammarBootstrap
from workers.grammar.worker import run
from workers.model_tokenizer.loading import hide_torch
from workers.process import run_worker

hide_torch()
run_worker(GrammarBootstrap, run)
