"""Replaces a model's linear layers by products of ours. The model's code, names and shapes stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from workers.gpu.products.fp8 import to_fp8
from workers.gpu.products.int4 import to_int4
from workers.gpu.products.multiply import multiply

_ROUTER_OUTPUTS = 256  # at most; layers of so few outputs choose experts by small differences, and have few bytes


class Product(nn.Module):
    """A linear layer, y = x weight^T + bias. `weight` [N, K] is in x's dtype, in fp8 with `scale` [N] float32, or
    in 4 bits, [N, K / 8] with `scale` [1 or 2, N, K / G], see `int4`.

    It shares the memory of the tensors that it is made of."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale: torch.Tensor | None
        self.register_buffer("scale", None)

    def to_fp8(self, scale: torch.Tensor | None = None) -> None:
        """Round the weight to fp8, by `scale` [N] float32 if it is given. Its memory is free afterwards, unless
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


def replace_linears(modules: Iterable[nn.Module]) -> list[Product]:
    """Replace every plain linear layer inside these modules by a Product on the same weights. Those that their
    checkpoint stores in fp8 or in 4 bits are so again. Returns the products."""
    products = []
    # A reference to a linear layer would keep its weight after it has been replaced.
    parents = {part for module in modules for part in module.modules() if type(part) is not nn.Linear}
    for parent in parents:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                products.append(product := Product(child.weight, child.bias))
                if (scale := stored_scale(child)) is not None:
                    (product.to_int4 if scale.ndim == 3 else product.to_fp8)(scale)
                setattr(parent, name, product)
    return products


def stored_scale(layer: nn.Module) -> torch.Tensor | None:
    """The scale of a linear layer whose checkpoint stores it in fp8, with a scale for each output or one, or in groups
    of 4 bits: [N] float32 or [1 or 2, N, K / G], see `int4`. Rounding the weight by this scale gives the checkpoint's
    numbers. None for other layers."""
    scale: torch.Tensor | None = getattr(layer, "weight_scale", None)
    return scale


def quantizable(products: Iterable[Product]) -> list[Product]:
    """The products whose weights fp8 makes smaller without changing what a model decides: all but routers."""
    return [product for product in products if product.out_features > _ROUTER_OUTPUTS]
