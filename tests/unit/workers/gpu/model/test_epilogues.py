"""What products do of what follows them: only where the pattern is whole, and with the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from workers.gpu.model.epilogues import Epilogues
from workers.gpu.products.multiply import shape_of
from workers.gpu.products.product import Product

WIDTH = 32


class Layer(nn.Module):
    """A decoder layer's second half, with variations."""

    def __init__(self, variation: str) -> None:
        super().__init__()
        self.variation = variation
        self.up = Product(torch.randn(2 * WIDTH, WIDTH))
        self.down = Product(torch.randn(WIDTH, WIDTH))
        if variation == "4 bits":
            self.up.to_int4(torch.ones(1, 2 * WIDTH, 1))
            self.down.to_int4(torch.ones(1, WIDTH, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [WIDTH - 4, WIDTH + 4] if self.variation == "uneven" else [WIDTH, WIDTH]
        product = self.up(x)
        gate, value = torch.split(product, sizes, -1)
        if self.variation == "uneven":
            gate, value = torch.cat((gate, gate[..., :4]), -1), value[..., 4:]
        act = nn.functional.gelu(gate) if self.variation == "gelu" else nn.functional.silu(gate)
        hidden = value * act
        if self.variation == "gate used twice":
            hidden = hidden + gate
        if self.variation == "product used twice":
            hidden = hidden + product[..., :WIDTH]
        result = self.down(hidden)
        if self.variation == "dropout":
            result = nn.functional.dropout(result, 0.5, self.training)
        if self.variation == "scaled residual":
            return x + 0.5 * result
        if self.variation == "broadcast residual":
            return result + x[:, :1]
        if self.variation == "own residual":
            return result + result
        total = x + result
        return total / 2 if self.variation == "goes on" else total


@pytest.mark.parametrize(
    ("variation", "gates", "residuals"),
    [
        ("plain", 1, 1),
        ("4 bits", 1, 1),
        ("dropout", 1, 1),
        ("gelu", 0, 1),
        ("uneven", 0, 1),
        ("gate used twice", 0, 1),
        ("product used twice", 0, 1),
        ("scaled residual", 1, 0),
        ("broadcast residual", 1, 0),
        ("own residual", 1, 0),
        ("goes on", 1, 0),
    ],
)
@torch.inference_mode()
def test_patterns_are_found_whole_and_give_the_same(variation: str, gates: int, residuals: int) -> None:
    torch._dynamo.reset()
    layer, x, seen = Layer(variation).eval(), torch.randn(2, 5, WIDTH), []
    expected = layer(x)

    def backend(graph: GraphModule, _: Any) -> Any:
        seen.extend(graph.graph.nodes)
        return graph

    epilogues = Epilogues()
    layer.compile(fullgraph=True, dynamic=True, backend=epilogues.before(backend))
    torch.testing.assert_close(layer(x), expected)
    assert sum(node.target is torch.ops.ringfeed.multiply_gated for node in seen) == gates
    assert epilogues.gated == ({shape_of(layer.up.weight, layer.up.scale)} if gates else set())
    products = [node for node in seen if node.target is torch.ops.ringfeed.multiply]
    assert len(products) == 2 - gates
    assert sum(node.args[4] is not None for node in products) == residuals
