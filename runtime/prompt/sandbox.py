"""Running a checkpoint's chat template: another's program, bounded in what it reaches, in time and in memory.

Jinja's sandbox keeps templates from Python's internals. It bounds neither loops in loops nor the strings they build, so
here every loop, call, filter, operator and output draws on one budget. It is counted in steps, not in seconds: what is
refused on one machine is refused on all.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import islice
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.compiler import CodeGenerator, Frame

STEPS = 300_000
"""An ordinary template takes some hundreds, and a hundred for each turn of a conversation; all are spent in seconds."""
SIZE = 4 << 20
"""The most that one value may hold: characters of a string, digits of a number, eight for each entry of a list."""
PER_STEP = 64
"""How much of a value's size costs as much as a step."""
BINARY_OPERATORS = frozenset(["+", "-", "*", "/", "//", "%", "**"])


class BudgetError(Exception):
    """A template took more than it may."""


_left: ContextVar[list[int]] = ContextVar("steps that the template being rendered has left")


@contextmanager
def budget() -> Iterator[None]:
    """What is rendered in the block may take `STEPS`."""
    token = _left.set([STEPS])
    try:
        yield
    finally:
        _left.reset(token)


def _spend(steps: int = 1) -> None:
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        raise BudgetError("it runs too long")


def _size(value: object) -> int:
    """A bound on the text that a value becomes; `BudgetError` beyond `SIZE`."""
    if isinstance(value, str) and len(value) < PER_STEP:  # mostly it is a short string
        return len(value)
    total, waiting = 0, [value]
    while waiting and total <= SIZE:
        entry = waiting.pop()
        if isinstance(entry, str | bytes):
            total += len(entry)
        elif isinstance(entry, int | float):
            total += 1 + (entry.bit_length() // 3 if isinstance(entry, int) else 24)
        elif isinstance(entry, dict | Mapping):  # a dict is one without asking the abstract class
            total += 8 * len(entry)
            waiting += [*entry.keys(), *entry.values()] if total <= SIZE else []
        elif isinstance(entry, list | tuple | set | frozenset | range):
            total += 8 * len(entry)
            waiting += entry if total <= SIZE and not isinstance(entry, range) else []
        else:
            total += 8
    if total > SIZE:
        raise BudgetError("it builds a value that is too large")
    _spend(total // PER_STEP)
    return total


def _factor(value: object) -> int:
    """How many times as large an argument can make something: a width, a count, a separator."""
    if isinstance(value, str):
        return _size(value)
    if isinstance(value, int):
        return abs(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return max([_size(value), *(abs(entry) for entry in inner if isinstance(entry, int))])


def _checked(first: object, others: Iterable[object]) -> None:
    """`BudgetError` if `first` might become larger than `SIZE` by an operation with `others`."""
    _spend()
    size = _size(first)
    for other in others:
        if size * _factor(other) > SIZE:
            raise BudgetError("it builds a value that is too large")


def _checked_format(form: object) -> None:
    """`BudgetError` for a format that fills up to a great width: `%99999d`, `{:99999}`."""
    if isinstance(form, str) and _WIDTH.search(form):
        raise BudgetError("it builds a value that is too large")


def _listed(values: Any) -> Any:
    """An iterator as a list, so that its size is known; each of its items is a step."""
    if type(values) in _PLAIN or not isinstance(values, Iterator):
        return values
    items = list(islice(values, max(_left.get()[0], 0) + 1))
    _spend(len(items))
    return items


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is checked before and after; wraps keeps the marks by which Jinja passes it its environment."""
    writes_widths = function.__name__ == "do_format"

    @wraps(function)
    def filtered(*arguments: Any, **options: Any) -> Any:
        arguments = tuple(map(_listed, arguments))
        known = [value for value in (*arguments, *options.values()) if not isinstance(value, _OF_JINJA)]
        if writes_widths:
            _checked_format(known[0])
        if known:
            _checked(known[0], known[1:])
        result = function(*arguments, **options)
        if result is not True and result is not False:  # as most tests say
            _size(result)
        return result

    return filtered


_WIDTH = re.compile(r"[0-9]{5}")
_PLAIN = frozenset([str, int, bool, dict, list, tuple, type(None)])
"""No iterators; it is known without asking the abstract class."""
_OF_JINJA = (jinja2.Environment, jinja2.runtime.Context, jinja2.nodes.EvalContext)


class _Generator(CodeGenerator):
    """Leads loops, comparisons, slices and `~`, which the sandbox lets pass, to methods of the environment."""

    def visit_For(self, node: jinja2.nodes.For, frame: Frame) -> None:  # noqa: N802
        node.iter = _call("counted", node.iter)
        super().visit_For(node, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Operand(self, node: jinja2.nodes.Operand, frame: Frame) -> None:  # noqa: N802
        """The right side of a comparison, as in `a in b`."""
        node.expr = _call("measured", node.expr)
        super().visit_Operand(node, frame)

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        """`a[1:]` does not go through `getitem`."""
        if isinstance(node.arg, jinja2.nodes.Slice):
            node.node = _call("measured", node.node)
        super().visit_Getitem(node, frame)


def _call(method: str, argument: Any) -> jinja2.nodes.Call:
    """A call of one of the environment's own methods."""
    function = jinja2.nodes.EnvironmentAttribute(method)
    return jinja2.nodes.Call(function, [argument], [], None, None, lineno=argument.lineno)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox in which everything that a template does is counted; render inside of `budget`."""

    code_generator_class = _Generator
    intercepted_binops = BINARY_OPERATORS

    def __init__(
        self,
        extensions: Sequence[type[jinja2.ext.Extension]],
        functions: Mapping[str, Callable[..., Any]],
        filters: Mapping[str, Callable[..., Any]],
    ) -> None:
        # Not optimized: Jinja would compute constant expressions, however large, when it compiles.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[*extensions], optimized=False, finalize=_output
        )
        del self.globals["lipsum"]  # random text of any length
        del self.filters["urlize"]  # for HTML, and slow
        self.globals |= functions
        every_filter: dict[str, Any] = {**self.filters, **filters}
        every_test: dict[str, Any] = {**self.tests}
        self.filters = {name: _bounded(function) for name, function in every_filter.items()}
        self.tests = {name: _bounded(function) for name, function in every_test.items()}

    def counted(self, values: Any) -> Any:
        """What a loop goes over: each turn is a step."""
        return values if isinstance(values, jinja2.Undefined) else _listed(iter(values))

    def measured(self, value: Any) -> Any:
        """What is searched, compared or copied: the larger, the more steps."""
        value = _listed(value)
        _size(value)
        return value

    def joined(self, parts: Iterable[object]) -> str:
        """`a ~ b`."""
        return self.concat(list(map(str, parts)))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The pieces of a block, a macro or the whole prompt as one string."""
        pieces = list(parts)
        _spend()
        _size(pieces)
        return "".join(pieces)

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **options: Any) -> Any:  # noqa: N805
        """A call, of a method of a string or of a list as well."""
        if __obj in (__self.counted, __self.measured):
            return __obj(*arguments)
        # The sandbox puts a function of its own in the place of str.format.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", "")
        arguments = tuple(map(_listed, arguments))
        values = [value for value in (*arguments, *options.values()) if not isinstance(value, _OF_JINJA)]
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            _checked_format(owner)
        limited = __self.globals.get("range")  # pyright: ignore[reportAttributeAccessIssue] - it loses __self
        if __obj is not limited:  # it has a limit, and its turns are counted
            _checked(owner if isinstance(owner, str | list | tuple | dict) else "", values)
        result = super().call(__context, __obj, *arguments, **options)
        _size(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator: `*` and `%` multiply sizes, `**` multiplies digits, the others add."""
        if operator == "%":
            _checked_format(left)
        if operator in ("*", "%"):
            numbers = isinstance(left, int) and isinstance(right, int)
            _checked(_digits(left) if numbers else left, [_digits(right) if numbers else right])
            if not numbers and isinstance(left, int):
                _checked(right, [left])
        elif operator == "**":
            _checked(_digits(left), [right])
        else:
            _spend()
            if _size(left) + _size(right) > SIZE:
                raise BudgetError("it builds a value that is too large")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`a.b`."""
        _spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`a[b]`."""
        result = super().getitem(obj, argument)
        _spend(1 + (len(result) // PER_STEP if isinstance(result, str | list) else 0))
        return result


def _digits(value: Any) -> str:
    """A string as long as a number's bits."""
    return "1" * min(value.bit_length() + 1, SIZE) if isinstance(value, int) else str(value)


def _output(value: Any) -> Any:
    """What `{{ … }}` writes."""
    _size(value)
    return value
