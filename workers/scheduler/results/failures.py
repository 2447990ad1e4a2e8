"""The errors that end sequences for which the device could sample no token."""

from __future__ import annotations

from ipc.errors import Interrupted, LogitsNotFinite, RequestFailed, RingfeedError, TokensExcluded
from ipc.long_values import BAD_WORDS, TOKEN_MASK, long_columns_of
from ipc.messages import Ended
from workers.scheduler.sequence import Sequence


def not_finite(sequence: Sequence, num_tokens: int) -> Ended:
    """The logits after the first `num_tokens` tokens are not finite."""
    return _error(
        sequence,
        LogitsNotFinite,
        f"the logits after token {num_tokens} of this request are not finite: the model computed NaN or infinity, as "
        'float16 does when activations overflow; model.dtype "bfloat16" or "float32" avoids that',
    )


def excluded(sequence: Sequence, num_tokens: int, late_after_s: float | None) -> Ended:
    """Every token after the first `num_tokens` tokens is excluded.

    `late_after_s`: the sequence's mask was missing after so long, and counted as closed. None: no mask was missing, so
    the parameters exclude every token, or every token that the grammar allows.
    """
    begin = f"no token can follow token {num_tokens} of this request:"
    names = _excluding_parameters(sequence)
    if late_after_s is not None:
        text = (
            f"{begin} the mask of its grammar did not come within grammar.mask_timeout_s ({late_after_s:g}), or its "
            "grammar process failed"
        )
        return _error(sequence, Interrupted, text)
    if not sequence.has_grammar:
        names = names or "its parameters"
        return _error(sequence, TokensExcluded, f"{begin} {names} exclude every token; allow more tokens")
    if names:
        text = f"{begin} {names} exclude every token that its grammar allows; allow more tokens"
        return _error(sequence, TokensExcluded, text)
    return _error(sequence, RequestFailed, f"{begin} its grammar allows none; simplify the grammar")


def _excluding_parameters(sequence: Sequence) -> str:
    """The parameters of this sequence that exclude tokens. The tokenizer has taken the long ones out of `params`."""
    columns, params = long_columns_of(sequence.long_values), sequence.params
    names = []
    if columns & TOKEN_MASK:
        names.append("allowed_token_ids or bad_words")
    elif columns & BAD_WORDS:
        names.append("bad_words")
    if params.min_tokens:
        names.append(f"min_tokens ({params.min_tokens})")
    if params.thinking_token_budget is not None:
        names.append(f"thinking_token_budget ({params.thinking_token_budget})")
    return " and ".join(names)


def _error(sequence: Sequence, kind: type[RingfeedError], text: str) -> Ended:
    return Ended(key=sequence.key, finish_reason="error", error_code=kind.code, error_message=text)
