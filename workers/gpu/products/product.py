"""Replaces a model's linear layers by products of ours. The model's code, names and shapes stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear

from workers.gpu.products.fp8 import to_fp8
from workers.gpu.products.int4 import to_int4
from workers.gpu.products.multiply import multiply

ROUTER_OUTPUTS: Final = 256  # at most; layers of so few outputs choose experts by small differences, and have few bytes


class Product(nn.Module):
    """A linear layer, y = x weight^T + bias. `weight` [N, K] is in x's dtype, in fp8 with a float32 `scale` of outputs
    or of blocks, see `fp8`, or in 4 bits, [N, K / 8] with `scale` [1 or 2, N, K / G], see `int4`.

    It shares the memory of the tensors that it is made of, unless the weight's rows have gaps: kernels read whole rows,
    one after another."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale: torch.Tensor | None
        self.register_buffer("scale", None)

    def to_fp8(self, scale: torch.Tensor | None = None) -> None:
        """Round the weight to fp8, by `scale` if it is given; see `fp8`. Its memory is free afterwards, unless
        something else holds it."""
        values, self.scale = to_fp8(self.weight.data, scale)
        self.weight = nn.Parameter(values, requires_grad=False)

    def to_int4(self, scale: torch.Tensor) -> None:
        """Pack the weight into the 4 bits that it was made of, by its scales and zero points; see `int4`. Its memory
        is free afterwards, unless something else holds it."""
        self.scale = scale
        self.weight = nn.Parameter(to_int4(self.weight.data, scale), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]"""
        rows = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            result = torch.ops.ringfeed.multiply(rows, self.weight, self.scale, self.bias, None)
        else:
            result = multiply(rows, self.weight, self.scale, self.bias)
        return result.view(*x.shape[:-1], self.out_features)  # type: ignore[no-any-return]


def find_read(modules: Iterable[nn.Module], forward: Callable[[], object]) -> set[nn.Module]:
    """Run `forward`, a forward of these modules, and return the plain linear layers whose weight other code reads.

    Such code knows nothing of scales: LongCat's router multiplies by its layer's weight in float32.
    """
    read: set[nn.Module] = set()

    class Watched(nn.Linear):
        def __getattr__(self, name: str) -> Any:
            if name == "weight":
                read.add(self)
            return super().__getattr__(name)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            weight = self._parameters["weight"]
            assert weight is not None
            return linear(input, weight, self._parameters["bias"])

    layers = [part for module in modules for part in module.modules() if type(part) is nn.Linear]
    for layer in layers:
        layer.__class__ = Watched
    try:
        forward()
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
    return read


def replace_linears(modules: Iterable[nn.Module], kept: Collection[nn.Module] = ()) -> list[Product]:
    """Replace every plain linear layer inside these modules, except `kept`, by a Product on the same weights. Those
    that their checkpoint stores in fp8 or in 4 bits are so again. Returns the products."""
    products = []
    # A reference to a linear layer would keep its weight after it has been replaced.
    made: WeakKeyDictionary[nn.Module, Product] = WeakKeyDictionary()  # of layers that have several places
    parents = {part for module in modules for part in module.modules() if type(part) is not nn.Linear}
    for parent in parents:
        for name, child in list(parent._modules.items()):  # which has all names of a child
            if type(child) is nn.Linear and child not in kept:
                if child not in made:
                    products.append(product := Product(child.weight, child.bias))
                    if (scale := stored_scale(child)) is not None:
                        (product.to_int4 if scale.ndim == 3 else product.to_fp8)(scale)
                    made[child] = product
                setattr(parent, name, made[child])
    return products


def stored_scale(layer: nn.Module) -> torch.Tensor | None:
    """The scale of a linear layer whose checkpoint stores it in fp8, or in groups of 4 bits; see `fp8` and `int4`.
    Rounding the weight by this scale gives the checkpoint's numbers. None for other layers."""
    scale: torch.Tensor | None = getattr(layer, "weight_scale", None)
    return scale


def quantizable(products: Iterable[Product]) -> list[Product]:
    """The products whose weights fp8 makes smaller without changing what a model decides: all but routers."""
    return [product for product in products if product.out_features > ROUTER_OUTPUTS]
