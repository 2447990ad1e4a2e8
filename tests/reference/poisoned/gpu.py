"""`python -m tests.reference.poisoned.gpu`: a GPU process that dies of some tokens."""

import os
import signal

import torch

from tests.reference.poisoned import TOKEN_ID
from workers.gpu.config import GpuBootstrap
from workers.gpu.execution.null_model import NullModel
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.worker import prepare, run
from workers.process import run_worker

logits = NullModel.logits


def logits_or_die(self: NullModel, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
    if bool((batch.input_ids == TOKEN_ID).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    return logits(self, batch, out=out)


NullModel.logits = logits_or_die  # type: ignore[method-assign]
run_worker(GpuBootstrap, run, prepare)
