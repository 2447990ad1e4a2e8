"""Lets products do what follows them: silu(gate) times value, and the addition of a layer's last residual.

The pairs are found by their pattern in the graph that Dynamo traced of a layer, never by a family's names:

    multiply > view > split in two halves > silu(first) * second      becomes  multiply_gated > view
    multiply > view > + another tensor, which ends the layer          becomes  multiply with a residual > view

Each saves a kernel, and a border between two, in every layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

from workers.gpu.products.multiply import Shape, shape_of

_MULTIPLY: Final = (torch.ops.ringfeed.multiply, torch.ops.ringfeed.multiply.default)
_SPLITS: Final = (torch.split, torch.functional.split, "split")
_PRODUCTS: Final = (operator.mul, torch.mul, "mul")
_SUMS: Final = (operator.add, torch.add, "add")
_SILU: Final = (torch.nn.functional.silu,)


class Epilogues:
    """Changes graphs before they are compiled. `gated`: the shapes of the weights whose products apply gates."""

    def __init__(self) -> None:
        self.gated: set[Shape] = set()

    def before(self, backend: Callable[..., Any]) -> Callable[[GraphModule, list[Any]], Any]:
        """A backend of torch.compile that changes each graph and hands it to `backend`."""

        def compile_changed(graph: GraphModule, inputs: list[Any]) -> Any:
            self.fuse(graph)
            return backend(graph, inputs)

        return compile_changed

    def fuse(self, graph: GraphModule) -> None:
        for node in graph.graph.nodes:
            if node.target is torch.nn.functional.dropout and node.args[2:3] == (False,):  # outside of training
                node.replace_all_uses_with(node.args[0])
        graph.graph.eliminate_dead_code()
        for node in list(graph.graph.nodes):
            if node.target not in _MULTIPLY:
                continue
            view = _only_user(node)
            if view is None or view.target != "view":
                continue
            self._fuse_gate(node, view) or _fuse_residual(node, view)
        graph.graph.eliminate_dead_code()
        graph.recompile()

    def _fuse_gate(self, product: Node, view: Node) -> bool:
        split = _only_user(view)
        if split is None or split.target not in _SPLITS or split.args[2:] != (-1,):
            return False
        sizes = split.args[1]
        if not isinstance(sizes, list | tuple) or len(sizes) != 2 or sizes[0] != sizes[1]:
            return False
        parts = {user.args[1]: user for user in split.users if user.target is operator.getitem}
        if set(parts) != {0, 1} or len(split.users) != 2:
            return False
        silu = _only_user(parts[0])
        if silu is None or silu.target not in _SILU:
            return False
        result = _only_user(silu)
        if result is None or result.target not in _PRODUCTS or _only_user(parts[1]) is not result:
            return False
        x, weight, scale, bias, residual = product.args
        if residual is not None:
            return False
        graph = product.graph
        with graph.inserting_before(view):  # where the product was: what follows may change its input in place
            gated = graph.call_function(torch.ops.ringfeed.multiply_gated, (x, weight, scale, bias))
            result.replace_all_uses_with(graph.call_method("view", (gated, *view.args[1:-1], sizes[0])))
        assert isinstance(weight, Node)
        self.gated.add(shape_of(_example(weight), _example(scale) if isinstance(scale, Node) else None))
        return True


def _fuse_residual(product: Node, view: Node) -> bool:
    result = _only_user(view)
    if result is None or result.target not in _SUMS or len(result.args) != 2 or result.kwargs:
        return False
    if any(user.op != "output" for user in result.users):  # torch adds in the kernel that uses the sum
        return False
    others = [each for each in result.args if each is not view]
    if len(others) != 1 or not isinstance(others[0], Node):
        return False
    other, own = _example(others[0]), _example(view)
    if not isinstance(other, torch.Tensor) or other.dtype != own.dtype or tuple(other.shape) != tuple(own.shape):
        return False
    x, weight, scale, bias, residual = product.args
    if residual is not None:
        return False
    graph = product.graph
    with graph.inserting_before(result):
        rows = graph.call_method("reshape", (others[0], -1, own.shape[-1]))
        total = graph.call_function(torch.ops.ringfeed.multiply, (x, weight, scale, bias, rows))
        result.replace_all_uses_with(graph.call_method("view", (total, *view.args[1:])))
    return True


def _only_user(node: Node) -> Node | None:
    """The node that uses this one, if there is one only. It may use it in several arguments."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _example(node: Node) -> Any:
    """The tensor without data that the trace had here."""
    return node.meta.get("example_value")
