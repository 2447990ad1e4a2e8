"""Compares the masks that a model requests from transformers with the arguments of its attention calls.

Paged attention gets no masks: a token sees itself and the tokens before it, within the `sliding_window` of the call. A
model may express more only in its masks, such as a window, chunks, or sight of later tokens. So the gate runs the model
once with an attention name for which transformers builds masks. Each mask stands for its mask function, which can be
evaluated for any two positions, not only for the few positions of the run.
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
"""transformers' mask function of (b, h, q, k): True if token q sees token k, in sequence b and head h."""

_masks: dict[int, tuple[torch.Tensor, MaskFunction]] = {}  # by the memory address of a mask, which its slices share


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
    """Return the mask function of an attention call's mask; None if transformers did not build the mask."""
    if not isinstance(mask, torch.Tensor):
        return None
    _, function = _masks.get(mask.untyped_storage().data_ptr(), (None, None))
    return function


def agreeing_length(function: MaskFunction, window: int | None, max_model_len: int, device: torch.device) -> int:
    """Return the longest sequence for which a mask equals paged attention's own mask; at most `max_model_len`.

    `window` is the attention call's argument. Returns 0 if the masks differ from the first token on.
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
    low, high = 0, last  # a window or a chunk affects every token from some position on
    while low < high:
        middle = (low + high) // 2
        if agrees(middle):
            low = middle + 1
        else:
            high = middle
    return low


class _MoreOfTheSame(TorchFunctionMode):
    """Lets a mask function index tensors beyond their end, by using the last element instead.

    Otherwise the index would be out of bounds, and on a GPU the process cannot continue after that error.
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
    """Build a mask. transformers calls this by keywords. The mask only has the right shape, and identifies its
    function."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    _masks[mask.untyped_storage().data_ptr()] = (mask, mask_function)
    return mask


AttentionMaskInterface.register(MASKED_NAME, _build_mask)
