"""Compile and run the Jinja template of a chat, which comes out of a file and is not trusted.

The base is Jinja's own sandbox. Three things are added. The parsed template may hold only known kinds of nodes, at most
three loops inside each other, and names from the tables of `operations`. Its tree is rewritten so that whatever
makes or runs over a value goes through the `Guard` of the rendering. And the lookup of attributes is by a list of what
is allowed. `chat` calls this module; it knows nothing of messages.
"""

import contextlib
import datetime
import types
from collections.abc import Callable, Iterator, Mapping

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kllama.errors import CheckpointError
from kllama.text.chat.guard import (
    Clock,
    Guard,
    GuardedNamespace,
    Refused,
    TemplateRaised,
    TooExpensive,
    bounded,
    guard_globals,
    loop_attribute,
)
from kllama.text.chat.marks import SPAN_END, SPAN_START, strip_marks, unescape_marks
from kllama.text.chat.operations import (
    FILTER_NAMES,
    METHODS,
    TEST_NAMES,
    attribute,
    guarded_filters,
    guarded_tests,
)

MAX_SOURCE = 2**20
MAX_TOKENS = 20_000
MAX_NAMES = 500
MAX_DEPTH = 100
MAX_LOOPS = 3
COMPILE_SECONDS = 0.5

STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Macro, nodes.CallBlock)
STATEMENTS += (nodes.FilterBlock, nodes.With, nodes.Assign, nodes.AssignBlock, nodes.Continue, nodes.Break, nodes.Scope)
EXPRESSIONS = (nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword)
EXPRESSIONS += (nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice)
EXPRESSIONS += (nodes.Concat, nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr)


class CompiledTemplate:
    """A template that is ready to be run.

    Args:
        source: str. The Jinja text.

    Raises:
        CheckpointError: the source is too large, not valid, or uses what templates do not have here; with the line.
    """

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"chat template: size = {len(source)} characters; expected at most {MAX_SOURCE}.")
        self.size = len(source)
        self._environment = _Environment()
        with _template_faults():
            self._code = self._environment.compile(source)
        self.uses_generation: bool = self._environment.uses_generation

    def run(
        self,
        variables: Mapping,
        input_size: int,
        now: datetime.datetime,
        restore_marks: Callable[[str], str] = unescape_marks,
    ) -> str:
        """Render the template.

        Args:
            variables: what the template sees, made of plain JSON values.
            input_size: int. Characters of the variables.
            now: the time that `strftime_now` tells.
            restore_marks: function that puts the marks back into what `repr` or JSON has written.

        Returns:
            The text, with the marks of the generation blocks in it.

        Raises:
            ValueError: the template itself has refused the variables.
            CheckpointError: the template fails, reaches for what it may not have, or is too expensive.
        """
        guard = Guard(input_size + self.size, now, restore_marks)
        environment = self._environment.overlay()
        environment.guard = guard
        environment.filters = guarded_filters(guard, environment)
        environment.tests = guarded_tests(guard)
        template = jinja2.Template.from_code(environment, self._code, guard_globals(guard))
        with _template_faults(template):
            guard.context = template.new_context(dict(variables))
            return guard.joined(template.root_render_func(guard.context))


@contextlib.contextmanager
def _template_faults(template: jinja2.Template | None = None) -> Iterator[None]:
    """Turn what goes wrong inside a template into a `CheckpointError` with the line."""
    try:
        yield
    except TemplateRaised as error:
        raise ValueError(f"messages: the chat template refuses them: {strip_marks(str(error))}") from None
    except CheckpointError:
        raise
    except Exception as error:
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else _line(error, template)
        where = "chat template" if line is None else f"chat template, line {line}"
        raise CheckpointError(strip_marks(f"{where}: {_reason(error)}")) from error


def _reason(error: Exception) -> str:
    if isinstance(error, TooExpensive | MemoryError | OverflowError | RecursionError):
        return f"template too expensive: {error}."
    if isinstance(error, Refused):
        return f"{error}: not allowed; expected only what the sandbox of chat templates has."
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.message}. Expected a valid Jinja template."
    return f"{type(error).__name__}: {str(error)[:500]}. The template does not fit what it was given, or is wrong."


def _line(error: Exception, template: jinja2.Template | None) -> int | None:
    line, trace = None, error.__traceback__
    while trace is not None and template is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every operation sent through `self.guard`, which each rendering sets on its own copy."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    intercepted_unops = frozenset(("+", "-"))
    guard: Guard
    uses_generation = False

    def __init__(self):
        # Without the optimizer no operation runs before there is a guard.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            extensions=[LoopControlExtension, _GenerationBlocks, _TokenLimit],
        )
        self.globals = {}
        self.filters = dict.fromkeys(FILTER_NAMES, _unbound)
        self.tests = dict.fromkeys(TEST_NAMES, _unbound)

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        _check_tree(tree)
        return _rewrite(tree)

    def call(self, context, function, /, *args, _loop_vars=None, _block_vars=None, **kwargs):
        # Inside a loop or a block Jinja passes its variables along, for functions that ask for the context: none here.
        if type(function) is types.MethodType and function.__self__ is self.guard:  # what `_rewrite` has put there
            return function(*args, **kwargs)
        return self.guard.call(context, function, args, kwargs)

    def call_binop(self, context, operator, left, right):
        return self.guard.operate(operator, self.binop_table[operator], left, right)

    def call_unop(self, context, operator, arg):
        return self.unop_table[operator](self.guard.touch(arg))

    def getattr(self, obj, attribute):
        return self._look_up(obj, attribute, attribute_first=True)

    def getitem(self, obj, argument):
        if isinstance(argument, str):
            return self._look_up(obj, argument, attribute_first=False)
        self.guard.step()
        if type(obj) is Undefined:
            return obj[argument]  # raises Jinja's own error
        if type(obj) in (str, list, tuple, dict):
            with contextlib.suppress(LookupError, TypeError):
                return obj[argument]
        return self.undefined(obj=obj, name=argument)

    def _look_up(self, obj, name, attribute_first):
        self.guard.step()
        if type(obj) is Undefined:
            return obj[name]  # raises Jinja's own error
        if type(obj) is LoopContext:
            return loop_attribute(self.guard, obj, name)
        if type(obj) is GuardedNamespace:
            return obj._Namespace__attrs.get(name, self.undefined(obj=obj, name=name))
        if type(obj) is dict and not (attribute_first and hasattr(obj, name)):
            if name in obj:
                return obj[name]
            if name not in METHODS[dict] and not name.startswith("__"):
                return self.undefined(obj=obj, name=name)
        found = attribute(self.guard, obj, name)
        return self.undefined(obj=obj, name=name) if found is None else found


def _unbound(*args, **kwargs):
    raise Refused("an operation before rendering")


class _TokenLimit(Extension):
    """Stop a template that is too long to compile in little time."""

    def filter_stream(self, stream):
        clock = Clock(COMPILE_SECONDS)
        for count, token in enumerate(stream):
            clock.check()
            if count > MAX_TOKENS:
                raise TooExpensive(f"more than {MAX_TOKENS} tokens in the template")
            yield token


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes, with a mark at either end."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.uses_generation = True
        start, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (SPAN_START, SPAN_END))
        return nodes.Scope([start, *body, end], lineno=line)


def _check_tree(tree: nodes.Template) -> None:
    """Refuse kinds of nodes that templates do not have here, deep nesting, and names outside the tables."""
    names, pending = set(), [(tree, 0, 0)]
    while pending:
        node, depth, loops = pending.pop()
        kind = type(node).__name__
        if not isinstance(node, STATEMENTS + EXPRESSIONS):
            raise jinja2.TemplateSyntaxError(f"{kind}: not allowed in a chat template", node.lineno)
        if isinstance(node, nodes.For):
            loops += 1
            if node.recursive:
                raise jinja2.TemplateSyntaxError("a recursive loop: not allowed in a chat template", node.lineno)
        if depth > MAX_DEPTH or loops > MAX_LOOPS:
            raise TooExpensive(f"line {node.lineno}: nested deeper than {MAX_DEPTH}, or {MAX_LOOPS} loops")
        table = {nodes.Filter: FILTER_NAMES, nodes.Test: TEST_NAMES}.get(type(node))
        if table is not None and node.name not in table:
            known = ", ".join(sorted(table))
            raise jinja2.TemplateSyntaxError(f"{kind.lower()} {node.name!r}; expected one of {known}", node.lineno)
        if isinstance(node, nodes.Const):
            bounded(node.value)
        if isinstance(node, nodes.Name):
            names.add(node.name)
            if len(names) > MAX_NAMES:
                raise TooExpensive(f"more than {MAX_NAMES} names in the template")
        # A chain such as a.b.c or a + b + c leans to the left, as deep as it is long.
        pending.extend((child, depth + 1, loops) for child in node.iter_child_nodes())


def _rewrite(node: nodes.Node) -> nodes.Node:
    """Send what makes or runs over a value through the guard of the environment."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_rewrite(part) if isinstance(part, nodes.Node) else part for part in value])
        elif isinstance(value, nodes.Node):
            setattr(node, field, _rewrite(value))
    if isinstance(node, nodes.Output):
        node.nodes = [_guarded("write", _constant(child)) for child in node.nodes]
    elif isinstance(node, nodes.For):
        node.iter = _guarded("iterate", node.iter)
    elif isinstance(node, nodes.Compare):
        node.expr = _guarded("touch", node.expr)
    elif isinstance(node, nodes.Operand):
        node.expr = _guarded("touch", node.expr)
    return _rewritten_value(node)


def _rewritten_value(node):
    if isinstance(node, nodes.Concat):
        return _guarded("concat", *node.nodes)
    if isinstance(node, nodes.List | nodes.Dict) or isinstance(node, nodes.Tuple) and node.ctx == "load":
        return _guarded("made", node)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _guarded("slice", node.node, *(bound or nodes.Const(None, lineno=node.lineno) for bound in bounds))
    return node


def _constant(child):
    return nodes.Const(child.data, lineno=child.lineno) if isinstance(child, nodes.TemplateData) else child


def _guarded(operation, *args):
    line = args[0].lineno
    target = nodes.EnvironmentAttribute(f"guard.{operation}", lineno=line)
    return nodes.Call(target, list(args), [], None, None, lineno=line)
