"""Log-probabilities in the form of `/v1/completions`: four lists, with the place of each token in the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from pipeline.client.outputs import TokenLogprob
from pipeline.http.openai.wire import finite, token_name


class LogprobWriter:
    """Writes the rows of one choice.

    `text_offset` counts characters from the beginning of the choice's text. A token that begins within a character has
    the offset of that character.

    Args:
        num_top: how many alternatives each row shows, besides those that the request names.
        as_ids: tokens are written "token_id:7", vLLM's `return_tokens_as_token_ids`.
        offset: of the first row. Negative: the first -offset characters of the tokens are not in the text.
    """

    def __init__(self, num_top: int, *, as_ids: bool, offset: int = 0) -> None:
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, rows: Sequence[TokenLogprob | None], first: TokenLogprob | None = None) -> dict[str, Any]:
        """The next rows. A prompt's first token has no log-probability: its row is None, and `first` names it."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for row in rows:
            token = row or first
            assert token is not None, "only the first token of a prompt has no row"
            tokens.append(self._name(token, token.token_id))
            values.append(None if row is None else finite(row.logprob))
            tops.append(None if row is None else self._top(row))
            offsets.append(max(0, self._offset))
            self._offset += len(self._decoder.decode(token.bytes))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, row: TokenLogprob) -> dict[str, float]:
        """As in vLLM, the sampled token is always among them. Of tokens with the same text, the first one counts."""
        top = {self._name(row, row.token_id): finite(row.logprob)}
        for token_id, value in [*list(row.top.items())[: self._num_top], *row.requested.items()]:
            top.setdefault(self._name(row, token_id), finite(value))
        return top

    def _name(self, row: TokenLogprob, token_id: int) -> str:
        return token_name(row, token_id, as_ids=self._as_ids)


def joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """The rows of both, in order."""
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}
