"""Finds RMSNorm in front of products in the graph that Dynamo traced of a layer, and lets the products apply it.

    [to float32 >] x^2 > mean > + eps > rsqrt > * x [> to the model's dtype] > * weight > reshape > multiply

becomes `multiply` of x with the norm's weight and eps, if all that uses the norm are products. A family may write it
otherwise: then torch compiles the norm as it does everything else.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

import workers.gpu.products.multiply  # noqa: F401  (registers the operators)

MULTIPLY: Final = (torch.ops.ringfeed.multiply, torch.ops.ringfeed.multiply.default)
PRODUCT: Final = (*MULTIPLY, torch.ops.ringfeed.multiply_gated, torch.ops.ringfeed.multiply_gated.default)
_VIEWS: Final = ("view", "reshape", torch.reshape)
_PRODUCTS: Final = (operator.mul, torch.mul, "mul")
_SUMS: Final = (operator.add, torch.add, "add")
_IN_PLACE: Final = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


def fuse_norm(product: Node) -> bool:
    """Let `product`, a node of PRODUCT, apply the norm of its x, if it has one that only products use."""
    rows = product.args[0]
    if not isinstance(rows, Node) or not is_view(rows):
        return False
    result = _argument(rows, 0)
    if result is None or (found := norm_of(result)) is None:
        return False
    if not all(is_view(view) and _is_only_x(view) for view in result.users):
        return False
    x, weight, eps = found
    with product.graph.inserting_before(product):
        own_rows = product.graph.call_method("reshape", (x, *rows.args[1:]))
    product.args = (own_rows, *product.args[1:], weight, eps)
    return True


def norm_of(result: Node) -> tuple[Node, Node, float] | None:
    """x, the weight and eps, if this node is an RMSNorm of x."""
    dtype = _dtype(result)
    if (factors := _operands(result, _PRODUCTS)) is None:
        return None
    for weight, scaled in (factors, factors[::-1]):
        is_weight = weight.op in ("placeholder", "get_attr") and _shape(weight) == _shape(result)[-1:]
        if is_weight and _dtype(weight) == dtype and (found := _scaled_of(scaled, dtype)) is not None:
            return found[0], weight, found[1]
    return None


def changes_in_place(graph: GraphModule) -> bool:
    """Whether a node of the graph changes a tensor that another has made. Then x may not be read later than before."""
    return any(
        node.target in _IN_PLACE or (node.op == "call_method" and str(node.target).endswith("_"))
        for node in graph.graph.nodes
    )


def is_view(node: Node) -> bool:
    return node.target in _VIEWS and isinstance(node.args[0], Node)


def _scaled_of(scaled: Node, dtype: Any) -> tuple[Node, float] | None:
    """x and eps, if this node is x over the root of the mean of its squares, computed in float32, in `dtype`."""
    if scaled.target == "to" and scaled.args[1:] == (dtype,):
        inner = _argument(scaled, 0)
    else:
        inner = scaled if dtype == torch.float32 else None
    factors = None if inner is None else _operands(inner, _PRODUCTS)
    if factors is None:
        return None
    for wide, root in (factors, factors[::-1]):
        eps = _eps_of(root, wide)
        if eps is not None and _dtype(wide) == torch.float32:
            narrow = _argument(wide, 0) if wide.target == "to" and wide.args[1:] == (torch.float32,) else None
            x = wide if narrow is None else narrow
            return (x, eps) if _dtype(x) == dtype else None
    return None


def _eps_of(root: Node, wide: Node) -> float | None:
    """eps, if `root` is rsqrt(mean(wide^2) + eps)."""
    total = _argument(root, 0) if root.target in (torch.rsqrt, "rsqrt") else None
    if total is None or total.target not in _SUMS or len(total.args) != 2:
        return None
    mean, eps = total.args if isinstance(total.args[0], Node) else reversed(total.args)
    if not isinstance(mean, Node) or not isinstance(eps, float) or mean.target not in ("mean", torch.mean):
        return None
    square = _argument(mean, 0)
    if square is None or mean.args[1:] not in ((-1,), ([-1],)) or mean.kwargs != {"keepdim": True}:
        return None
    is_square = square.target in ("pow", torch.pow) and square.args == (wide, 2)
    return eps if is_square or (square.target in _PRODUCTS and square.args == (wide, wide)) else None


def _operands(node: Node, targets: tuple[Any, ...]) -> tuple[Node, Node] | None:
    """The two nodes that this one, of one of `targets`, computes of."""
    if node.target not in targets or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    return (first, second) if isinstance(first, Node) and isinstance(second, Node) else None


def _argument(node: Node, index: int) -> Node | None:
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, Node) else None


def _is_only_x(view: Node) -> bool:
    return all(user.target in PRODUCT and view not in user.args[1:] for user in view.users)


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(getattr(node.meta.get("example_value"), "shape", ()))


def _dtype(node: Node) -> Any:
    return getattr(node.meta.get("example_value"), "dtype", None)
