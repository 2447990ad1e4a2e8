"""Finds out from a chat template's source which form of messages it expects. Renders nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jinja2 import nodes

_CONTENT = "content"
_DEVELOPER = "developer"


class TemplateTraits(NamedTuple):
    """What the text of a template shows. A template may still treat different messages differently."""

    reads_parts: bool  # a loop goes over the parts of a content
    reads_text: bool  # a test asks whether a content is a text
    knows_developer: bool  # the role "developer" is compared with something

    @classmethod
    def of(cls, tree: nodes.Template) -> TemplateTraits:
        """Read the syntax tree of a template, as the environment's `parse` returns it.

        vLLM detects loops over contents in the same way (`vllm/renderers/hf.py`). Unlike there, a content may also
        reach its loop as the argument of a macro, as in templates of Qwen and GLM.
        """
        names = _content_names(tree)
        return cls(
            any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)),
            any(test.name == "string" and _is_content(test.node, names) for test in tree.find_all(nodes.Test)),
            any(constant.value == _DEVELOPER for constant in tree.find_all(nodes.Const)),
        )


def _content_names(tree: nodes.Template) -> set[str]:
    """Variables that hold a message's content somewhere: assigned from it, or a macro's parameter."""
    assignments = [
        (assign.target.name, assign.node)
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name)
    ]
    macros = {macro.name: [argument.name for argument in macro.args] for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            parameters = macros[call.node.name]
            assignments += zip(parameters, call.args, strict=False)
            assignments += [(keyword.key, keyword.value) for keyword in call.kwargs if keyword.key in parameters]
    names: set[str] = set()
    while added := {name for name, node in assignments if name not in names and _is_content(node, names)}:
        names |= added
    return names


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    return any(
        (isinstance(source, nodes.Getattr) and source.attr == _CONTENT)
        or (isinstance(source, nodes.Getitem) and isinstance(source.arg, nodes.Const) and source.arg.value == _CONTENT)
        or (isinstance(source, nodes.Name) and source.name in names)
        for source in _sources(node)
    )


def _sources(node: nodes.Node | None) -> Iterator[nodes.Node]:
    """The expressions whose value, or a part of it, `node` may have: through filters, slices, conditions and `or`."""
    if isinstance(node, nodes.Filter) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        yield from _sources(node.node)
    elif isinstance(node, nodes.CondExpr):
        yield from _sources(node.expr1)
        yield from _sources(node.expr2)
    elif isinstance(node, nodes.Or | nodes.And):
        yield from _sources(node.left)
        yield from _sources(node.right)
    elif node is not None:
        yield node
