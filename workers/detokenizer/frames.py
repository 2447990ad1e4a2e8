"""Builds the `Outputs` frame of one client, within its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from ipc.messages import FinalOutput, Outputs, PromptLogprobs, TokenLogprobs
from workers.detokenizer.logprob_columns import words_of
from workers.detokenizer.request_state import Sequence
from workers.model_tokenizer.token_bytes import token_bytes_table

MAX_FRAME_ITEMS: Final = 8_192  # in one Outputs
MAX_FRAME_WORDS: Final = 131_072  # token ids and log-probabilities in one Outputs, before its last item
MAX_PROMPT_PARTS: Final = 4_096  # parts of prompts' log-probabilities in one Outputs, before its last item
MAX_ITEM_TOKENS: Final = 65_536  # of one sequence in one Outputs: 28 MB with the most log-probabilities


class FrameBuilder:
    """Collects items, each with the new text and tokens of one sequence."""

    __slots__ = (
        "_counts", "_finals", "_logprobs", "_num_words", "_prompt_parts", "_prompts", "_request_ids", "_samples",
        "_texts", "_token_ids",
    )  # fmt: skip

    def __init__(self) -> None:
        self._request_ids: list[str] = []
        self._samples: list[int] = []
        self._texts: list[str] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []
        self._finals: list[tuple[int, FinalOutput]] = []
        self._logprobs: list[tuple[int, TokenLogprobs]] = []
        self._prompt_parts: list[tuple[int, PromptLogprobs]] = []
        self._prompts: list[tuple[int, int, int]] = []
        self._num_words = 0

    @property
    def is_full(self) -> bool:
        return self._num_words >= MAX_FRAME_WORDS or len(self._prompt_parts) >= MAX_PROMPT_PARTS

    def add(
        self, sequence: Sequence, text: str, new: list[int], prompt_parts: list[PromptLogprobs], *, is_last: bool
    ) -> None:
        """Add one item; `new` are its tokens. It takes their log-probabilities and the sequence's end.

        `prompt_parts` are the next log-probabilities of its prompt.
        """
        index = len(self._request_ids)
        for part in prompt_parts:
            self._prompt_parts.append((index, part))
            self._num_words += words_of(part)
        request = sequence.request
        if not sequence.num_sent and new and request.stream and sequence.sample == 0:
            self._prompts.append((index, request.num_prompt_tokens, request.num_cached_tokens))
        sequence.num_sent += len(new)
        if sequence.logprobs is not None and new:
            self._logprobs.append((index, sequence.logprobs.take(len(new))))
            self._num_words += len(new) * sequence.logprobs.words_per_token
        if is_last:
            self._finals.append((index, sequence.take_final()))
        self._request_ids.append(request.request_id)
        self._samples.append(sequence.sample)
        self._texts.append(text)
        self._counts.append(len(new))
        self._token_ids += new
        self._num_words += len(new)

    def outputs(self, bytes_of: Callable[[int], bytes]) -> Outputs:
        """The message. `bytes_of` gives the bytes of the tokens that have log-probabilities."""
        token_ids = np.array(self._token_ids, "<i4").tobytes()
        columns = [column for _, part in self._logprobs for column in (part.top_ids, part.extra_ids)]
        columns += [column for _, part in self._prompt_parts for column in (part.token_ids, part.columns.top_ids)]
        return Outputs(
            request_ids=self._request_ids,
            texts=self._texts,
            num_token_ids=np.array(self._counts, "<i4").tobytes(),
            token_ids=token_ids,
            finals=self._finals,
            logprobs=self._logprobs,
            token_bytes=token_bytes_table([*self._sampled(), *columns], bytes_of) if columns else None,
            samples=np.array(self._samples, "<i4").tobytes() if any(self._samples) else b"",
            prompt_logprobs=self._prompt_parts,
            prompts=self._prompts,
        )

    def _sampled(self) -> list[bytes]:
        """The new tokens of the items that have log-probabilities."""
        starts = np.cumsum([0, *self._counts]).tolist()
        return [
            np.array(self._token_ids[starts[index] : starts[index + 1]], "<i4").tobytes() for index, _ in self._logprobs
        ]
