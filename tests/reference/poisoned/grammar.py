"""`python -m tests.reference.poisoned.grammar`: a grammar process that dies when it follows some grammars."""

import os
import signal

import numpy as np
from numpy.typing import NDArray

from ipc.messages import Compile, MatcherFailed
from tests.reference.poisoned import CHOICE
from workers.grammar.config import GrammarBootstrap
from workers.grammar.core import GrammarCore
from workers.grammar.worker import run
from workers.model_tokenizer.loading import hide_torch
from workers.process import run_worker

compile_grammar, fill = GrammarCore.compile, GrammarCore.fill
poisonous: set[int] = set()


def compile_and_note(self: GrammarCore, message: Compile) -> None:
    if CHOICE in (message.spec.choice or ()):
        poisonous.add(message.key)
    compile_grammar(self, message)


def fill_or_die(
    self: GrammarCore, keys: list[int], token_ids: list[int], masks: NDArray[np.int32]
) -> list[MatcherFailed]:
    if poisonous.intersection(keys):
        os.kill(os.getpid(), signal.SIGKILL)
    return fill(self, keys, token_ids, masks)


GrammarCore.compile = compile_and_note  # type: ignore[method-assign]
GrammarCore.fill = fill_or_die  # type: ignore[method-assign]
hide_torch()
run_worker(GrammarBootstrap, run)
