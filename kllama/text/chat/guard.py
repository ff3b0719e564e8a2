"""What one rendering of a chat template may cost, and the operations whose cost the template could choose.

A template is a file's content, so it may be hostile. The sandbox (`sandbox`) sends every literal, loop, operator,
call and piece of output of a template through one `Guard`, made for that rendering. The guard counts steps, bounds the
size of each value before or as it is made, and looks at the processor time of the thread. Filters, tests and methods
are in `operations`.

Size is counted as in JSON: the characters of a string, and a few for each other value. A value that stands twice in a
list counts twice, so lists of lists cannot double their way to a size that only printing would show.
"""

import datetime
import re
import time
from collections.abc import Callable, Iterable, Iterator

from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.utils import Namespace

from kllama.text.chat.marks import unescape_marks

SECONDS = 0.5
# What one step can add to that. A step is short by the other limits: what takes longer is Python collecting garbage.
STEP_SECONDS = 0.02
MAX_STEPS = 250_000
MAX_CALL_DEPTH = 40
MAX_INT_BITS = 64
MAX_RANGE = 2**16
MAX_NEEDLE = 64
MAX_MESSAGE = 2000
MAX_FORMATTED = 512  # what one field of % may add to the size of its value: a width, or the digits of a float
# All of what % may be asked for. Python looks for the end of a key by counting parentheses, so a key has none.
PERCENT = re.compile(r"(?:[^%]|%%|%(?:\([^()]*\))?[-+ #0]{0,5}\d{0,2}(?:\.\d{0,2})?[sdif])*+")
# In units of the largest value: what all values of one rendering may add up to, and what it may write. Text in a macro
# or a captured block is written there, and again where it is used.
MAX_MADE = 64
MAX_WRITTEN = 4

NUMBERS = (int, float)  # bool is an int
SCALARS = (str, int, float, bool, type(None))
CONTAINERS = (list, tuple, dict)
VIEWS = (type({}.keys()), type({}.values()), type({}.items()), range)
ITERATORS = (type(iter([])),)
PARTS = frozenset((*SCALARS, *CONTAINERS, Undefined))  # what a list or dict may hold
VALUES = PARTS | {*VIEWS, *ITERATORS}  # what a filter may be given


class TooExpensive(Exception):
    """The template asks for more than a rendering may cost."""


class Refused(Exception):
    """The template asks for an operation that templates do not have here."""


class TemplateRaised(Exception):
    """The template called `raise_exception`: it refuses the messages."""


class Operation:
    """A function that a template may call. It has no attributes and no text."""

    __slots__ = ("name", "function")

    def __init__(self, name, function):
        self.name = name
        self.function = function


class GuardedNamespace(Namespace):
    """A `namespace()` that holds no other namespace, so that values stay trees of bounded size."""

    def __setitem__(self, name, value):
        if isinstance(value, Namespace) or not isinstance(name, str) or name.startswith("_"):
            raise Refused(f"namespace.{name}: a name with an underscore, or a namespace in a namespace")
        super().__setitem__(name, value)


class Clock:
    """The processor time of this thread, looked at step by step.

    Args:
        seconds: float. How much of it there is.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._left = seconds
        self._last = time.thread_time()

    def check(self) -> None:
        """Count the time since the last look, and raise `TooExpensive` if there is none left."""
        now = time.thread_time()
        self._left -= min(now - self._last, STEP_SECONDS)
        self._last = now
        if self._left < 0:
            raise TooExpensive(f"more than {self._seconds} s of processor time")


class Guard:
    """The account of one rendering.

    Args:
        input_size: int. Characters of the template and of what it is given. No value may become larger than four
            times that and 64 Ki.
        now: the time that `strftime_now` tells.
        restore_marks: function that puts the marks back into what `repr` or JSON has written.
    """

    def __init__(self, input_size: int, now: datetime.datetime, restore_marks: Callable[[str], str] = unescape_marks):
        self.now = now
        self.restore_marks = restore_marks
        self.max_size = 4 * input_size + 2**16
        self.steps_left = MAX_STEPS
        self.made_left = MAX_MADE * self.max_size
        self.written_left = MAX_WRITTEN * self.max_size
        self._clock = Clock(SECONDS)
        self.call_depth = 0
        self.context: Context | None = None  # set by the sandbox; filters such as map() look up other filters in it
        self._sizes: dict[int, tuple[object, int]] = {}  # by identity, with the value so that it stays alive

    # Accounts

    def step(self) -> None:
        """Count one operation."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise TooExpensive(f"more than {MAX_STEPS} operations")
        self._clock.check()

    def reserve(self, size: int) -> None:
        """Count one operation that makes a value of a size that is known beforehand."""
        self.step()
        if size > self.max_size:
            raise TooExpensive(f"a value of {size} characters; expected at most {self.max_size}")
        self.made_left -= size
        if self.made_left < 0:
            raise TooExpensive("more characters in all values together than a rendering may make")

    def made(self, value):
        """Count a value that has just been made, and return it. Iterators are run, within bounds."""
        if isinstance(value, Iterator) and type(value) not in ITERATORS:
            value = iter(self.collect(value))
        else:
            self.reserve(self.size(value))
        return value

    def touch(self, value):
        """Count an operation on a value that may be nested, and return it."""
        self.step()
        if type(value) in CONTAINERS:
            self.size(value)
        return value

    def collect(self, values: Iterable) -> list:
        """Return the values of an iterable as a list, stopping where it grows too large."""
        collected, size = [], 2
        for value in values:
            self.step()
            size += self.size(value) + 2
            if size > self.max_size:
                raise TooExpensive(f"a list of more than {self.max_size} characters")
            collected.append(value)
        self._sizes[id(collected)] = (collected, size)
        self.reserve(size)
        return collected

    def size(self, value) -> int:
        """Return the size of a value, every part counted as often as it stands there."""
        if type(value) is str:
            return len(value)
        if type(value) is int:
            return 8 + value.bit_length() // 3
        if type(value) not in CONTAINERS:
            return 8
        if (known := self._sizes.get(id(value))) is not None:
            return known[1]
        size = 2 + sum(self._part_size(part) + 2 for part in _parts(value))
        if size > self.max_size:
            raise TooExpensive(f"a nested value of more than {self.max_size} characters")
        self._sizes[id(value)] = (value, size)
        return size

    def _part_size(self, part) -> int:
        if type(part) not in PARTS:
            raise Refused(f"a {type(part).__name__} in a list or dict")
        return self.size(part)

    # What the rewritten template calls

    def write(self, value) -> str:
        """Return the text of a value that the template writes, to its output or to a captured block."""
        text = self.text(value)
        self.step()
        self.written_left -= len(text)
        if self.written_left < 0 or len(text) > self.max_size:
            raise TooExpensive(f"more than {self.max_size} characters of output")
        return text

    def joined(self, pieces: Iterable[str]) -> str:
        """Return the whole output."""
        written, size = [], 0
        for piece in pieces:
            size += len(piece)
            if size > self.max_size:
                raise TooExpensive(f"more than {self.max_size} characters of output")
            written.append(piece)
        return "".join(written)

    def text(self, value) -> str:
        """Return a value as Jinja writes it."""
        if type(value) is str:
            return value
        if type(value) in (*SCALARS, Undefined):
            return str(value)
        if type(value) not in CONTAINERS:
            raise Refused(f"the text of a {type(value).__name__}")
        self.touch(value)
        text = self.restore_marks(repr(value))
        self.reserve(len(text))
        return text

    def concat(self, *values) -> str:
        """Join the texts of the operands of `~`."""
        texts = [self.text(value) for value in values]
        self.reserve(sum(map(len, texts)))
        return "".join(texts)

    def slice(self, value, start, stop, step):
        """Return `value[start:stop:step]`."""
        self.touch(value)
        if type(value) is Undefined:
            value[:]  # raises Jinja's own error
        if type(value) not in (str, list, tuple):
            raise Refused(f"a slice of a {type(value).__name__}")
        return self.made(value[start:stop:step])

    def iterate(self, values):
        """Return what a `for` loop runs over, each round a step."""
        self.touch(values)
        if type(values) not in (str, Undefined, *CONTAINERS, *VIEWS, *ITERATORS):
            raise TypeError(f"{type(values).__name__!r} object is not iterable")
        return _Rounds(self, values) if type(values) not in ITERATORS else self._rounds(values)

    def _rounds(self, values):
        for value in values:
            self.step()
            yield value

    def call(self, context: Context, function, args: tuple, kwargs: dict):
        """Call what a template may call: an operation of the table, or a macro."""
        for value in (*args, *kwargs.values()):
            self.touch(value)
        if type(function) is Operation:
            self.step()
            return function.function(*args, **kwargs)
        if type(function) is Undefined:
            return function()  # raises Jinja's own error
        if type(function) is not Macro:
            raise Refused(f"a call of a {type(function).__name__}")
        self.call_depth += 1
        if self.call_depth > MAX_CALL_DEPTH:
            raise TooExpensive(f"macros nested more than {MAX_CALL_DEPTH} deep")
        try:
            return self.made(context.call(function, *args, **kwargs))
        finally:
            self.call_depth -= 1

    def operate(self, operator: str, function, left, right):
        """Apply an arithmetic operator."""
        self.step()
        kinds = (type(left), type(right))
        if Undefined in kinds:
            return function(left, right)  # raises Jinja's own error
        if operator == "+" and kinds in ((str, str), (list, list), (tuple, tuple)):
            size = self.size(left) + self.size(right)
            self.reserve(size)
            total = left + right
            if kinds != (str, str):
                self._sizes[id(total)] = (total, size)
            return total
        if operator == "%" and kinds[0] is str:
            values = right if kinds[1] in (tuple, dict) else (right,)
            return self.format_percent(left, values)
        if not (isinstance(left, NUMBERS) and isinstance(right, NUMBERS)):
            return self._mismatch(operator, left, right)
        left, right = bounded(left), bounded(right)
        if operator == "**" and isinstance(left, int) and abs(right) > MAX_INT_BITS:
            raise TooExpensive(f"{operator} with an exponent of more than {MAX_INT_BITS}")
        return bounded(function(left, right))

    def _mismatch(self, operator, left, right):
        if operator == "*":
            raise Refused("* of anything but numbers")
        raise TypeError(f"{operator} of {type(left).__name__!r} and {type(right).__name__!r}")

    def format_percent(self, template: str, values) -> str:
        """Return `template % values`, for `%s`, `%d`, `%i` and `%f` with a width of at most two digits."""
        if PERCENT.fullmatch(template) is None:
            raise Refused("% with anything but %s, %d, %i and %f, of a width of at most 99")
        fields = template.count("%")
        if isinstance(values, dict):
            values = {name: self._scalar(value) for name, value in values.items()}
            largest = max(map(self.size, values.values()), default=0)
            self.reserve(len(template) + fields * (MAX_FORMATTED + largest))
        else:
            values = tuple(self._scalar(value) for value in values)
            self.reserve(len(template) + fields * MAX_FORMATTED + sum(map(self.size, values)))
        return self.made(template % values)

    def _scalar(self, value):
        return value if type(value) in SCALARS else self.text(value)


class _Rounds:
    """What a loop runs over, with the length that `loop.length` asks for."""

    def __init__(self, guard, values):
        self.guard = guard
        self.values = values

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return self.guard._rounds(self.values)


LOOP_ATTRIBUTES = frozenset("index index0 revindex revindex0 first last length previtem nextitem depth depth0".split())


def loop_attribute(guard: Guard, loop: LoopContext, name: str):
    """Return an attribute of `loop`."""
    if name in ("cycle", "changed"):
        return Operation(f"loop.{name}", getattr(loop, name))
    if name not in LOOP_ATTRIBUTES:
        raise Refused(f"loop.{name}")
    return getattr(loop, name)


def guard_globals(guard: Guard) -> dict[str, Operation]:
    """Return the functions that a template finds without being given them."""

    def make_range(*bounds):
        made = range(*bounds)
        if len(made) > MAX_RANGE:
            raise TooExpensive(f"a range of {len(made)}; expected at most {MAX_RANGE}")
        return made

    def make_dict(*args, **kwargs):
        return guard.made(dict(*args, **kwargs))

    def make_namespace(*args, **kwargs):
        values = dict(*args, **kwargs)
        guard.made(values)
        return GuardedNamespace(values)

    def raise_exception(message):
        raise TemplateRaised(guard.text(message)[:MAX_MESSAGE])

    def strftime_now(form):
        if len(form) > 256 or not re.fullmatch(r"([^%]|%-?[a-zA-Z%])*", form):
            raise Refused(f"strftime_now({form[:40]!r})")
        return guard.made(guard.now.strftime(form))

    functions = {
        "range": make_range,
        "dict": make_dict,
        "namespace": make_namespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return {name: Operation(name, function) for name, function in functions.items()}


def _parts(value):
    return (part for pair in value.items() for part in pair) if type(value) is dict else value


def bounded(number):
    """Return a number that is not too long to compute with; a longer integer raises `TooExpensive`."""
    if isinstance(number, int) and number.bit_length() > MAX_INT_BITS:
        raise TooExpensive(f"an integer of more than {MAX_INT_BITS} bits")
    return number
