"""Log-probabilities in the form of `/v1/completions`: four lists, with the place of each token in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.client.outputs import TokenLogprob
from pipeline.http.openai.wire import finite, token_name


class LogprobWriter:
    """Writes the rows of one choice. `text_offset` counts characters from the beginning of the choice's text.

    Args:
        num_top: how many alternatives each row shows.
        as_ids: as of `token_name`.
    """

    def __init__(self, num_top: int, *, as_ids: bool) -> None:
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = 0

    def write(self, rows: Sequence[TokenLogprob | None], first_token: str = "") -> dict[str, Any]:
        """The next rows. A prompt's first token has no log-probability: its row is None, and its text `first_token`."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for row in rows:
            offsets.append(self._offset)
            if row is None:
                tokens.append(first_token)
                values.append(None)
                tops.append(None)
                self._offset += len(first_token)
                continue
            name, value = self._name(row, row.token_id), finite(row.logprob)
            tokens.append(name)
            values.append(value)
            top = {self._name(row, each): finite(other) for each, other in list(row.top.items())[: self._num_top]}
            # As in vLLM, the sampled token is always among them.
            tops.append({name: value} | top if self._num_top else top)
            self._offset += len(row.text)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, row: TokenLogprob, token_id: int) -> str:
        return token_name(row, token_id, as_ids=self._as_ids)


def joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """The rows of both, in order."""
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}
