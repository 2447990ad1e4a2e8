"""Lets products do what precedes and follows them: RMSNorm, silu(gate) times value, and the addition of a residual.

They are found by their patterns in the graph that Dynamo traced of a layer, never by a family's names:

    multiply > view > split in two halves > silu(first) * second      becomes  multiply_gated > view
    RMSNorm > reshape > multiply                                      see `norm_pattern`
    multiply > view > + another tensor                                becomes  multiply with a residual > view

A sum stays if something else than products uses it within the layer: torch adds in the kernel that uses the sum. Each
pattern saves a kernel, and a border between two, in every layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

from workers.gpu.model.norm_pattern import MULTIPLY, PRODUCT, changes_in_place, fuse_norm, is_view
from workers.gpu.products.multiply import Shape, shape_of

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
        for node, view in _products(graph):
            self._fuse_gate(node, view)
        graph.graph.eliminate_dead_code()
        if not changes_in_place(graph):
            for node in list(graph.graph.nodes):
                if node.target in PRODUCT:
                    fuse_norm(node)
            graph.graph.eliminate_dead_code()
        for node, view in reversed(_products(graph)):  # a sum may go into the product that uses it as a residual
            _fuse_residual(node, view)
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
    if not all(user.op == "output" or _feeds_products(user) for user in result.users):
        return False
    others = [each for each in result.args if each is not view]
    if len(others) != 1 or not isinstance(others[0], Node):
        return False
    other, own = _example(others[0]), _example(view)
    if not isinstance(other, torch.Tensor) or other.dtype != own.dtype or tuple(other.shape) != tuple(own.shape):
        return False
    x, weight, scale, bias, residual, *norm = product.args
    if residual is not None:
        return False
    graph = product.graph
    with graph.inserting_before(result):
        rows = graph.call_method("reshape", (others[0], -1, own.shape[-1]))
        total = graph.call_function(torch.ops.ringfeed.multiply, (x, weight, scale, bias, rows, *norm))
        result.replace_all_uses_with(graph.call_method("view", (total, *view.args[1:])))
    for node in (result, view, product):  # else they would still count as users of what they used
        graph.erase_node(node)
    return True


def _products(graph: GraphModule) -> list[tuple[Node, Node]]:
    """The `multiply` nodes with the view that alone uses each."""
    products = [node for node in graph.graph.nodes if node.target in MULTIPLY]
    views = [_only_user(node) for node in products]
    return [
        (node, view) for node, view in zip(products, views, strict=True) if view is not None and view.target == "view"
    ]


def _feeds_products(view: Node) -> bool:
    """Whether only products use this node, as rows of one kind or the other."""
    return is_view(view) and all(user.target in PRODUCT for user in view.users)


def _only_user(node: Node) -> Node | None:
    """The node that uses this one, if there is one only. It may use it in several arguments."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _example(node: Node) -> Any:
    """The tensor without data that the trace had here."""
    return node.meta.get("example_value")
