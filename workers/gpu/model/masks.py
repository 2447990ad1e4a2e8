"""Compares the masks that a model asks transformers for with what its attention calls are told.

Paged attention gets no masks: it lets a token see itself and those before it, within the `sliding_window` of the call.
A model may keep more than that to its masks, such as a window, chunks, or sight of later tokens. So the model is run
once under a name of attention for which transformers does build masks. Each mask stands for the function that it is
built from, which can be asked about any two positions, not only the few that the model is run on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionMaskInterface

from workers.gpu.attention.interface import ATTENTION_NAME, MASKED_NAME

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers': whether, in sequence b and head h, the token at position q sees the one at k; (b, h, q, k)."""

_masks: dict[int, tuple[torch.Tensor, MaskFunction]] = {}  # by their memory, which slices of a mask share


@contextmanager
def building_masks(model: nn.Module) -> Iterator[None]:
    """Let transformers build the masks that the model asks for, in forwards inside this block."""
    model.set_attn_implementation(MASKED_NAME)  # type: ignore[operator]
    try:
        yield
    finally:
        _masks.clear()
        model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]


def function_of(mask: Any) -> MaskFunction | None:
    """What a mask that came to an attention call was built from; None if it is none of transformers'."""
    if not isinstance(mask, torch.Tensor):
        return None
    _, function = _masks.get(mask.untyped_storage().data_ptr(), (None, None))
    return function


def agreeing_length(function: MaskFunction, window: int | None, max_model_len: int, device: torch.device) -> int:
    """Up to which length of sequences a mask is no other than paged attention's own; at most `max_model_len`.

    `window`: what the attention call is told. 0 if they disagree from the first tokens on.
    """
    keys = torch.arange(max_model_len, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)

    def agrees(position: int) -> bool:
        own = keys <= position
        if window is not None:
            own &= keys > position - window
        with _MoreOfTheSame():
            seen = function(zero, zero, torch.full_like(zero, position), keys)
        return bool((seen.expand_as(own) == own).all())

    last = max_model_len - 1
    if all(agrees(position) for position in {0, last // 2, last}):
        return max_model_len
    if not agrees(0):
        return 0
    low, high = 0, last  # a window or a chunk makes a difference to every token from some position on
    while low < high:
        middle = (low + high) // 2
        if agrees(middle):
            low = middle + 1
        else:
            high = middle
    return low


class _MoreOfTheSame(TorchFunctionMode):
    """Lets a mask look up its tokens at positions beyond those that it was made for: they are taken for its last one.

    Without it, that would be an error, which a GPU does not survive.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            tensor, index = args
            if isinstance(index, tuple) and all(isinstance(each, torch.Tensor) for each in index):
                args = tensor, tuple(each.clamp(max=size - 1) for each, size in zip(index, tensor.shape, strict=False))
        return func(*args, **(kwargs or {}))


def _build_mask(
    batch_size: int, q_length: int, kv_length: int, *, mask_function: MaskFunction, device: torch.device, **_: Any
) -> torch.Tensor:
    """What transformers calls for a mask, by keywords: one of the right shape, which only stands for its function."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    _masks[mask.untyped_storage().data_ptr()] = (mask, mask_function)
    return mask


AttentionMaskInterface.register(MASKED_NAME, _build_mask)
