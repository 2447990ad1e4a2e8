"""What a grammar process decides: which requests it compiles, and which tokens their sequences may sample.

    compile   Compile -> the pool's threads -> take_answers: Compiled, and a matcher for each sequence,
              which has followed the tokens that a resumed sequence brings
    follow    the newest tokens of sequences -> their matchers advance
    fill      the same -> masks
    release   sequences have ended: their matchers are dropped, a compilation that nobody needs is cancelled

Every Compile gets one Compiled. Knows no sockets and no rings. One thread uses it, except for loading the vocabulary:
that begins when the engine is ready, on a thread of its own, so that no engine starts later because of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ipc.errors import InvalidRequest, ModelUnsupported, RingfeedError
from ipc.messages import Compile, Compiled, MatcherFailed
from ipc.records import NO_TOKEN
from workers.grammar.compile_pool import CompilePool
from workers.grammar.compiler import Compiler
from workers.grammar.matchers import Matchers
from workers.grammar.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

NO_KEY: Final = 0  # in place of a sequence that has ended
_RELEASED: Final = "all sequences of this request have ended"


class GrammarCore:
    """Call `take_answers` after every notification and when `next_deadline_s` has passed.

    Args:
        load: makes the vocabulary. Raises ModelUnsupported.
        notify: is called from other threads when `take_answers` has something to do.
        compile_timeout_s: limit to the compilation of one grammar.
    """

    def __init__(self, load: Callable[[], Vocabulary], notify: Callable[[], None], *, compile_timeout_s: float) -> None:
        self._load = load
        self._notify = notify
        self._compile_timeout_s = compile_timeout_s
        self._loading: threading.Thread | None = None
        self._loaded: Vocabulary | RingfeedError | None = None  # written by the loading thread, once
        self._pool: CompilePool | None = None
        self._matchers: Matchers | None = None
        self._compiling: dict[int, Compile] = {}  # unanswered, by the request's key
        self._open: dict[int, set[int]] = {}  # by the key of an unanswered request: its sequences that are not released
        self._requests: dict[int, int] = {}  # sequence of an unanswered request -> the request's key
        self._answers: list[Compiled] = []
        self._failed: set[int] = set()  # sequences with a problem that has been reported

    @property
    def num_matchers(self) -> int:
        return 0 if self._matchers is None else len(self._matchers)

    def start_loading(self) -> None:
        """Load the vocabulary in the background. Calling it again changes nothing."""
        if self._loading is None:
            self._loading = threading.Thread(target=self._load_vocabulary, name="vocabulary", daemon=True)
            self._loading.start()

    def finish_loading(self) -> None:
        """Load the vocabulary now, or wait until it is loaded."""
        self.start_loading()
        assert self._loading is not None, "start_loading has made the thread"
        self._loading.join()

    def compile(self, message: Compile) -> None:
        """Have a grammar compiled as soon as the vocabulary is loaded."""
        key, keys = message.key, range(message.key, message.key + message.num_samples)
        self._compiling[key] = message
        self._open[key] = set(keys)
        self._requests |= dict.fromkeys(keys, key)
        if self._pool is not None:
            self._pool.submit(key, message.spec)
        self.start_loading()

    def release(self, keys: Sequence[int]) -> None:
        """These sequences have ended, whether their grammar is compiled or not."""
        self._failed.difference_update(keys)
        if self._matchers is not None:
            self._matchers.forget(keys)
        for key in keys:
            request = self._requests.pop(key, None)
            if request is not None:
                self._open[request].discard(key)
                if not self._open[request]:
                    if self._pool is not None:
                        self._pool.cancel([request])
                    self._answer(request, InvalidRequest(_RELEASED))

    def take_answers(self) -> list[Compiled]:
        """The answers to `compile` since the last call. The sequences of a compiled grammar have matchers from now
        on."""
        if self._pool is None and self._loaded is not None:
            self._use(self._loaded)
        if self._pool is not None and self._matchers is not None:
            for key, outcome in self._pool.take():
                if isinstance(outcome, InvalidRequest):
                    self._answer(key, outcome)
                else:
                    message = self._compiling[key]
                    for sequence in sorted(self._open[key]):
                        self._matchers.add(sequence, outcome, message.end_ids)
                        if message.known:
                            known = np.frombuffer(message.known[sequence - key], "<i4")
                            self._matchers.replay(sequence, known.tolist())
                    self._answer(key, None)
        answers, self._answers = self._answers, []
        return answers

    def next_deadline_s(self) -> float | None:
        """Seconds until `take_answers` must be called without a notification; None: it need not be."""
        return None if self._pool is None else self._pool.next_deadline_s()

    def knows_some(self, keys: list[int]) -> bool:
        """Whether some sequence has a matcher, or all have ended. False: they are sequences of a predecessor."""
        matchers = self._matchers
        return (matchers is not None and any(key in matchers for key in keys)) or not any(keys)  # NO_KEY is 0

    def follow(self, keys: list[int], token_ids: list[int]) -> None:
        """Advance each sequence by its newest token, if it has one. Unknown sequences are ignored: they have ended, or
        this process has replaced the one that knew them."""
        if self._matchers is not None:
            for key, token_id in zip(keys, token_ids, strict=True):
                if token_id != NO_TOKEN:
                    self._matchers.advance(key, token_id)

    def fill(self, keys: list[int], token_ids: list[int], masks: NDArray[np.int32]) -> list[MatcherFailed]:
        """Advance each sequence by its newest token, and write its mask. Masks fail closed: all zero.

        `masks` is [at least len(keys), num_words]. Returns the sequences that have failed, each once.
        """
        self.follow(keys, token_ids)
        if self._matchers is None:
            masks[: len(keys)] = 0
            return []
        self._matchers.fill(keys, masks)
        failures = []
        for key in keys:
            if key not in self._failed and (problem := self._matchers.problem(key)):
                failures.append(MatcherFailed(key=key, reason=problem))
                self._failed.add(key)
        return failures

    def _answer(self, key: int, error: RingfeedError | None) -> None:
        del self._compiling[key]
        for sequence in self._open.pop(key):
            self._requests.pop(sequence, None)
        code, text = ("", "") if error is None else (error.code, str(error))
        self._answers.append(Compiled(key=key, error_code=code, error_message=text))

    def _load_vocabulary(self) -> None:
        try:
            self._loaded = self._load()
        except RingfeedError as error:
            self._loaded = error
        except Exception as error:
            logger.exception("the vocabulary cannot be loaded")
            self._loaded = ModelUnsupported(
                f"structured outputs cannot be used with this model: its vocabulary cannot be read "
                f"({type(error).__name__})"
            )
        self._notify()

    def _use(self, loaded: Vocabulary | RingfeedError) -> None:
        """The vocabulary is there, or never will be. Go on with the requests that have waited for it."""
        if isinstance(loaded, RingfeedError):
            for key in list(self._compiling):
                self._answer(key, loaded)
            return
        self._matchers = Matchers(loaded)
        self._pool = CompilePool(Compiler(loaded), self._notify, timeout_s=self._compile_timeout_s)
        for key, message in self._compiling.items():
            self._pool.submit(key, message.spec)
