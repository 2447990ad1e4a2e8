"""The errors that end sequences for which the device could sample no token."""

from __future__ import annotations

from ipc.errors import LogitsNotFinite, RequestFailed, RingfeedError, TokensExcluded
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


def excluded(sequence: Sequence, num_tokens: int, mask_timeout_s: float) -> Ended:
    """Every token after the first `num_tokens` tokens is excluded: by the parameters, or by a closed grammar mask."""
    names = _excluding_parameters(sequence)
    if not sequence.has_grammar:
        return _error(
            sequence,
            TokensExcluded,
            f"no token can follow token {num_tokens} of this request: {names or 'its parameters'} exclude every token; "
            "allow more tokens",
        )
    text = (
        f"no token can follow token {num_tokens} of this request: the mask of its grammar did not come within "
        f"grammar.mask_timeout_s ({mask_timeout_s:g}), or its grammar process failed; send the request again"
    )
    if names:
        text += f", or allow more tokens, because {names} may exclude every token that the grammar allows"
    return _error(sequence, RequestFailed, text)


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
