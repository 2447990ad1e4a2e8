"""The jinja2 environment in which chat templates run: sandboxed, and without operations that are large in one step.

A template is untrusted code, and so are the values that it sees. jinja2's sandbox keeps it from Python's internals.
This module adds bounds on each value that a template makes, because `'a' * 10**10` or a format with a huge width is a
single operation in C that no timer can interrupt. `render_limits.py` bounds everything that takes many operations.

Text of a template that stays within the bounds is the same as in transformers' `apply_chat_template`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
import jinja2.visitor
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from workers.tokenizer import value_bounds as bounds
from workers.tokenizer.bounded_filters import FILTERS, REMOVED_FILTERS

MAX_DATE_FORMAT_CHARS: Final = 256
_UNSAFE_METHODS: Final = (  # their results can be large without a large argument
    (str, {"translate", "maketrans"}),
    (int, {"to_bytes", "from_bytes"}),
)
_CONCAT: Final = "concat values"  # names of filters that no template can write
_CHECK: Final = "check value"


class TemplateSandbox(ImmutableSandboxedEnvironment):  # type: ignore[misc]
    """Compiles templates that see only JSON values, with the extensions, filters and globals of transformers."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols], cache_size=0
        )
        for name in REMOVED_FILTERS:
            del self.filters[name]
        self.filters |= FILTERS
        self.filters[_CONCAT] = lambda values: self.concat(map(str, values))
        self.filters[_CHECK] = bounds.checked_value
        del self.globals["lipsum"]
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = strftime_at(None)

    def compiled(self, source: str) -> tuple[jinja2.Template, jinja2.nodes.Template]:
        """The template, and its syntax tree as it is in the source. Raises what jinja2 and its parser raise."""
        tree = self.parse(source)
        bounded = _Bounder().visit(self.parse(source))
        bounded.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(bounded), self.make_globals(None)), tree

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins what macros, loops and blocks have written."""
        parts = list(pieces)
        bounds.check_chars(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        bounds.check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            args = bounds.checked_arguments(owner, name, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return bounds.checked_value(result) if name == "fromkeys" else result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, bytes):
            return attr == "decode"
        if any(isinstance(obj, kind) and attr in names for kind, names in _UNSAFE_METHODS):
            return False
        return bool(super().is_safe_attribute(obj, attr, value))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `str.format_map` with bounded fields, and without access to attributes of Python objects."""
        if super().wrap_str_format(value) is None:
            return None
        text, takes_map = str(value.__self__), value.__name__ == "format_map"

        def format_bounded(*args: Any, **kwargs: Any) -> str:
            if takes_map:
                [kwargs], args = args, ()
            return str(_BoundedFormatter(self).vformat(text, args, kwargs))

        return format_bounded


class _BoundedFormatter(SandboxedFormatter):  # type: ignore[misc]
    def __init__(self, environment: TemplateSandbox) -> None:
        super().__init__(environment)
        self._num_chars = 0

    def format_field(self, value: Any, format_spec: str) -> str:
        bounds.check_chars(bounds.largest_number(format_spec))
        field = str(super().format_field(value, format_spec))
        self._num_chars += len(field)
        bounds.check_chars(self._num_chars)
        return field


class _Bounder(jinja2.visitor.NodeTransformer):  # type: ignore[misc]
    """Rewrites operations that the sandbox does not intercept: `~`, and literals that hold computed values.

    A literal can hold one value many times. Values that hold each other in this way would take time and memory that
    double with each level, also in a mere comparison.
    """

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(_CONCAT, jinja2.nodes.List(node.nodes).set_lineno(node.lineno))

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return node if _is_constant(node.items) else _filtered(_CHECK, node)

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or _is_constant(node.items) else _filtered(_CHECK, node)

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return node if _is_constant(pair.value for pair in node.items) else _filtered(_CHECK, node)


def _is_constant(nodes: Iterable[jinja2.nodes.Node]) -> bool:
    return all(isinstance(node, jinja2.nodes.Const) for node in nodes)


def _filtered(name: str, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
    return jinja2.nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


class _TemplateDict:
    """`dict(...)` in a template. Not the class itself, which would give access to Python's types."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        made: dict[Any, Any] = bounds.checked_value(dict(*args, **kwargs))
        return made

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):  # type: ignore[misc]
    """`namespace(...)` in a template, without names that begin with an underscore: Python uses those."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *others = args  # a template may name an attribute `self`
        attributes = dict(*others, **kwargs)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute named {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_at(clock_s: float | None) -> Callable[[str], str]:
    """The `strftime_now` of a template that is rendered at this Unix time; None: at the time of the call."""

    def strftime_now(pattern: str) -> str:
        if len(pattern) > MAX_DATE_FORMAT_CHARS:
            raise SecurityError(f"a date format of {len(pattern)} characters is longer than {MAX_DATE_FORMAT_CHARS}")
        now = datetime.datetime.now() if clock_s is None else datetime.datetime.fromtimestamp(clock_s)
        return now.strftime(pattern)

    return strftime_now


class _GenerationTag(jinja2.ext.Extension):  # type: ignore[misc]
    """`{% generation %}` marks the model's own turns for training; here its body is rendered like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
