"""Fuses the projections of one input, such as query, key and value, or gate and up, into one product.

The layers that belong together are found by watching a forward, not by name. They are linear layers of one module that
take the same tensor, directly one after the other, once per forward. The first layer computes all products at once and
keeps the parts of the others until they are called, so the model's code stays as it is. The weights become views of one
tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from workers.gpu.products.fp8 import BLOCK, has_blocks
from workers.gpu.products.int4 import are_alike, join_scales
from workers.gpu.products.product import stored_scale


@dataclass(frozen=True)
class Projections:
    """Linear layers `names` of `parent`, in the order in which a forward calls them with one input."""

    parent: nn.Module
    names: tuple[str, ...]

    @property
    def layers(self) -> list[nn.Linear]:
        return [getattr(self.parent, name) for name in self.names]


def find_projections(model: nn.Module, forward: Callable[[], object]) -> list[Projections]:
    """Run `forward`, one forward of the model, and return the linear layers that can be computed together."""
    parents = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    calls: list[tuple[nn.Linear, torch.Tensor | None]] = []  # None: the input was passed by name
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: calls.append((module, inputs[0] if inputs else None)))
        for module in parents
        if type(module) is nn.Linear
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()

    num_calls = Counter(layer for layer, _ in calls)
    groups: list[list[nn.Linear]] = []
    previous: tuple[nn.Module, torch.Tensor | None] = model, None
    for layer, tensor in calls:
        parent = parents[layer][0]
        is_next = tensor is not None and previous[0] is parent and previous[1] is tensor
        if is_next and _match(groups[-1][-1], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
        previous = parent, tensor
    return [
        Projections(parents[group[0]][0], tuple(parents[layer][1] for layer in group))
        for group in groups
        if len(group) > 1 and all(num_calls[layer] == 1 for layer in group)
    ]


def _match(first: nn.Linear, second: nn.Linear) -> bool:
    return (
        first.weight.dtype == second.weight.dtype
        and first.weight.device == second.weight.device
        and (first.bias is None) == (second.bias is None)
        and are_alike(stored_scale(first), stored_scale(second))
        and (not has_blocks(stored_scale(first)) or first.weight.shape[0] % BLOCK == 0)  # blocks stay blocks
    )


def fuse_projections(groups: Sequence[Projections]) -> Callable[[], None]:
    """Fuse each group. Returns a function that undoes it: the model has its own layers again, on views of the fused
    weights.

    Temporarily allocates memory for one group's weights in addition to the model's.
    """
    originals = [group.layers for group in groups]
    for group, layers in zip(groups, originals, strict=True):
        fused = FusedProjections(layers)
        for name, module in zip(
            group.names, (fused, *(FusedPart(fused, i) for i in range(1, len(layers)))), strict=True
        ):
            setattr(group.parent, name, module)

    def undo() -> None:
        for group, layers in zip(groups, originals, strict=True):
            for name, layer in zip(group.names, layers, strict=True):
                setattr(group.parent, name, layer)

    return undo


class FusedProjections(nn.Module):
    """Replaces the first layer of a group by one layer for all, `joined` [sum of sizes, in_features]. `parts` holds the
    results of the other layers until their FusedPart is called."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.in_features = layers[0].in_features
        self.out_features = self.sizes[0]
        bias = None if layers[0].bias is None else _join([layer.bias for layer in layers])
        self.joined = linear_of(_join([layer.weight for layer in layers]), bias)
        scales = [scale for layer in layers if (scale := stored_scale(layer)) is not None]
        if scales:
            self.joined.weight_scale = join_scales(scales)
        self.parts: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., sizes[0]], a view of the product of all."""
        first, *others = torch.split(self.joined(x), self.sizes, -1)
        self.parts.update(enumerate(others, start=1))
        return first


class FusedPart(nn.Module):
    """Replaces another layer of a group: returns the part that the first layer computed for it."""

    def __init__(self, fused: FusedProjections, index: int) -> None:
        super().__init__()
        self.in_features = fused.in_features
        self.out_features = fused.sizes[index]
        self._index = index
        self._parts = fused.parts

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., sizes[index]]. The call removes the part, so that nothing is kept after a
        forward."""
        part: torch.Tensor = self._parts.pop(self._index)
        return part


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of these parameters, [out_features, in_features] and [out_features]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


def _join(parameters: Sequence[torch.Tensor]) -> nn.Parameter:
    """Join `parameters` by rows into one parameter; each of them becomes a view of its rows."""
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, torch.split(joined, [len(each) for each in parameters]), strict=True):
        parameter.data = rows
    return nn.Parameter(joined, requires_grad=False)
