"""`python -m tests.reference.poisoned.tokenizer`: a tokenizer that dies of some texts."""

import os
import signal

from ipc.messages import Tokenize
from tests.reference.poisoned import MARK
from workers.model_tokenizer.loading import hide_torch
from workers.process import run_worker
from workers.tokenizer.config import TokenizerBootstrap
from workers.tokenizer.core import Encoded, PromptEncoder
from workers.tokenizer.worker import run

encode = PromptEncoder.encode


def encode_or_die(self: PromptEncoder, request: Tokenize) -> Encoded:
    if MARK in (request.prompt or ""):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, request)


hide_torch()
PromptEncoder.encode = encode_or_die  # type: ignore[method-assign]
run_worker(TokenizerBootstrap, run)
