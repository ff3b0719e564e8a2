"""The filters, tests and methods that a chat template may use: a closed table.

They are what the templates of published models use. Those that cannot make a value larger than what they are given are
Jinja's and Python's own; the others are written here, and know the size of their result before they make it. Whatever
is not in the table is refused by name. `sandbox` calls this module, with the `Guard` of the rendering.
"""

import functools
import json
import re
import string
from collections.abc import Callable

import jinja2
from jinja2.filters import FILTERS
from jinja2.runtime import Undefined
from jinja2.tests import TESTS

from kllama.text.chat.guard import (
    CONTAINERS,
    MAX_NEEDLE,
    SCALARS,
    VALUES,
    Guard,
    Operation,
    Refused,
    TooExpensive,
    bounded,
)

MAX_INDENT = 16
MAX_SEPARATOR = 16
MAX_PRECISION = 20

# Jinja's own, by what they ask for as their first argument.
PLAIN_FILTERS = "count d default dictsort float items length".split()
TEXT_FILTERS = "capitalize lower title upper wordcount".split()
ENVIRONMENT_FILTERS = "first last max min sort unique".split()
CONTEXT_FILTERS = "map reject rejectattr select selectattr".split()
PLAIN_TESTS = (
    "!= < <= == > >= boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer "
    "iterable le lessthan lt mapping ne none number odd sameas sequence string true undefined"
).split()

STR_METHODS = frozenset(
    "capitalize count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace "
    "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit "
    "rstrip split splitlines startswith strip title upper".split()
)
METHODS: dict[type, frozenset[str]] = {
    str: STR_METHODS,
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
# Python searches from the right in time proportional to the product of both lengths.
BACKWARD = frozenset(("rfind", "rindex", "rsplit", "rpartition"))
STRIPS = frozenset(("strip", "lstrip", "rstrip"))


def join(guard: Guard, values, separator="", attribute=None) -> str:
    """Join the texts of values."""
    if attribute is not None:
        values = FILTERS["map"](guard.context, values, attribute=attribute)
    texts = [guard.text(value) for value in guard.collect(values)]
    separator = guard.text(separator)
    guard.reserve(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def replace(guard: Guard, text, old, new, count=None) -> str:
    """Replace a part of a text wherever it stands."""
    text, old, new = guard.text(text), guard.text(old), guard.text(new)
    found = text.count(old)
    count = -1 if count is None else count
    found = min(found, count) if count >= 0 else found
    guard.reserve(len(text) + found * max(0, len(new) - len(old)))
    return text.replace(old, new, count)


def indent(guard: Guard, text, width=4, first=False, blank=False) -> str:
    """Indent the lines of a text."""
    text = guard.text(text)
    size = len(width) if type(width) is str else width
    if size > MAX_SEPARATOR * 4:
        raise TooExpensive(f"indent({size})")
    guard.reserve(len(text) + size * (len(text.splitlines()) + 1))
    return FILTERS["indent"](text, width, first, blank)


def tojson(guard: Guard, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Return a value as JSON, non-ASCII and the order of keys kept, nothing escaped for HTML."""
    guard.touch(value)
    if type(indent) is str and len(indent) > MAX_INDENT or type(indent) is int and indent > MAX_INDENT:
        raise TooExpensive(f"tojson(indent={guard.text(indent)[:40]})")
    if separators is not None and (len(separators) != 2 or any(len(part) > MAX_SEPARATOR for part in separators)):
        raise TooExpensive(f"tojson(separators={guard.text(separators)[:40]})")
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )
    if indent is None:  # at most the six characters of an escape for each of the value
        text = encoder.encode(value)
    else:
        text = _encode_stepwise(guard, encoder, value)
    text = guard.restore_marks(text)
    guard.reserve(len(text))
    return text


def _encode_stepwise(guard, encoder, value):
    chunks, size = [], 0
    for chunk in encoder.iterencode(value):
        guard.step()
        size += len(chunk)
        if size > guard.max_size:
            raise TooExpensive(f"tojson of more than {guard.max_size} characters")
        chunks.append(chunk)
    return "".join(chunks)


def reverse(guard: Guard, value):
    """Return a text or the values of a list backwards."""
    return value[::-1] if type(value) is str else iter(guard.collect(value)[::-1])


def round_number(guard: Guard, value, precision=0, method="common"):
    """Round a number."""
    if not isinstance(precision, int) or abs(precision) > MAX_PRECISION:
        raise TooExpensive(f"round({guard.text(precision)})")
    return bounded(FILTERS["round"](value, precision, method))


def absolute(guard: Guard, value):
    """Return a number without its sign."""
    return bounded(FILTERS["abs"](value))


def integer(guard: Guard, value, default=0, base=10):
    """Return what a text or a number is as an integer."""
    if type(value) is str and len(value) > MAX_NEEDLE:
        raise TooExpensive(f"int of a text of {len(value)} characters; expected at most {MAX_NEEDLE}")
    return bounded(FILTERS["int"](value, default, base))


def add_up(guard: Guard, values, attribute=None, start=0):
    """Add numbers."""
    if attribute is not None:
        values = FILTERS["map"](guard.context, values, attribute=attribute)
    numbers = guard.collect(values)
    if not all(isinstance(number, int | float) for number in (*numbers, start)):
        raise TypeError("sum of anything but numbers")
    return bounded(sum(numbers, start))


def trim(guard: Guard, value, chars=None) -> str:
    """Strip a text."""
    return call_method(guard, guard.text(value), "strip", chars)


def format_filter(guard: Guard, template, *args, **kwargs) -> str:
    """Return `template % args`."""
    return guard.format_percent(guard.text(template), kwargs or args)


OWN_FILTERS: dict[str, Callable] = {
    "abs": absolute,
    "format": format_filter,
    "indent": indent,
    "int": integer,
    "join": join,
    "list": Guard.collect,
    "replace": replace,
    "reverse": reverse,
    "round": round_number,
    "safe": Guard.text,  # nothing here is escaped for HTML, so there is nothing to be exempt from it
    "string": Guard.text,
    "sum": add_up,
    "tojson": tojson,
    "trim": trim,
}
FILTER_NAMES = frozenset((*PLAIN_FILTERS, *TEXT_FILTERS, *ENVIRONMENT_FILTERS, *CONTEXT_FILTERS, *OWN_FILTERS))
TEST_NAMES = frozenset(PLAIN_TESTS)


def guarded_filters(guard: Guard, environment: jinja2.Environment) -> dict[str, Callable]:
    """Return the filters of one rendering, by name."""

    def of_text(function):
        return lambda value: function(guard.text(value))

    def in_context(function):
        return lambda *args, **kwargs: function(guard.context, *args, **kwargs)

    filters = {name: FILTERS[name] for name in PLAIN_FILTERS}
    filters |= {name: of_text(FILTERS[name]) for name in TEXT_FILTERS}
    filters |= {name: functools.partial(FILTERS[name], environment) for name in ENVIRONMENT_FILTERS}
    filters |= {name: in_context(FILTERS[name]) for name in CONTEXT_FILTERS}
    filters |= {name: functools.partial(function, guard) for name, function in OWN_FILTERS.items()}
    return {name: _guarded(guard, function, VALUES) for name, function in filters.items()}


def guarded_tests(guard: Guard) -> dict[str, Callable]:
    """Return the tests of one rendering, by name."""
    return {name: _guarded(guard, TESTS[name]) for name in PLAIN_TESTS}


def _guarded(guard, function, types=None):
    def run(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            guard.touch(value)
            if types is not None and type(value) not in types:
                raise Refused(f"a filter of a {type(value).__name__}")
        return guard.made(function(*args, **kwargs))

    return run


def bound_method(guard: Guard, value, name: str) -> Operation:
    """Return a method of the table, bound to its value."""
    return Operation(name, lambda *args, **kwargs: call_method(guard, value, name, *args, **kwargs))


def call_method(guard: Guard, value, name: str, *args, **kwargs):
    """Call a method of the table."""
    if type(value) is str and name == "replace":
        return replace(guard, value, *args, **kwargs)
    if type(value) is str and name == "join":
        return join(guard, *args, separator=value)
    if type(value) is str and name == "format":
        return _Formatter(guard).vformat(value, args, kwargs)
    if name in BACKWARD or name in STRIPS:
        if args and type(args[0]) is str and len(args[0]) > MAX_NEEDLE:
            raise TooExpensive(f"str.{name}() of more than {MAX_NEEDLE} characters")
    made = getattr(value, name)(*args, **kwargs)
    return made if name in ("items", "keys", "values") else guard.made(made)


class _Formatter(string.Formatter):
    """`str.format` of plain fields: `{}`, `{0}`, `{name}`, with a width of at most two digits."""

    def __init__(self, guard):
        self.guard = guard
        self.size = 0

    def get_field(self, field_name, args, kwargs):
        if not re.fullmatch(r"\w*", field_name):
            raise Refused(f"a field {field_name[:40]!r} of str.format(); expected a name or a number")
        return super().get_field(field_name, args, kwargs)

    def convert_field(self, value, conversion):
        if conversion not in (None, "s"):
            raise Refused(f"the conversion !{conversion} of str.format()")
        return value if type(value) in SCALARS else self.guard.text(value)

    def format_field(self, value, format_spec):
        if re.search(r"\d{3}", format_spec):
            raise TooExpensive(f"a width in {format_spec[:40]!r} of str.format()")
        self.guard.step()
        text = format(value, format_spec)
        self.size += len(text)
        if self.size > self.guard.max_size:
            raise TooExpensive(f"str.format() of more than {self.guard.max_size} characters")
        return text


def attribute(guard: Guard, value, name: str):
    """Return the method that a value has under a name; None where its type has no such attribute.

    Raises:
        Refused: the type has the attribute, but templates may not use it.
    """
    if name in METHODS.get(type(value), ()):
        return bound_method(guard, value, name)
    if type(value) not in (*SCALARS, *CONTAINERS, Undefined) or (type(value) is not Undefined and hasattr(value, name)):
        raise Refused(f"{type(value).__name__}.{name}")
    return None
