"""The sandbox of chat templates: hostile ones are refused at a bounded cost, honest ones mean what Jinja means."""

import copy
import datetime
import json
import time
import tracemalloc

import jinja2.sandbox
import pytest

from kllama.errors import CheckpointError
from kllama.text.chat import guard, sandbox
from kllama.text.chat.sandbox import CompiledTemplate
from kllama.text.chat.template import ChatTemplate

pytestmark = pytest.mark.backend_independent

MESSAGES = [
    {"role": "system", "content": " Sys "},
    {"role": "user", "content": "Héllo\n wörld"},
    {"role": "assistant", "content": "a,b,c", "calls": [{"n": 2}, {"n": 1.5}, {"n": True}]},
]
START = "{% set ns = namespace(x='xxxxxxxx') %}"
LIST = "{% set ns = namespace(x=[1]) %}"
LONG = START + "{% for i in range(12) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"  # 32 Ki characters


def doubled(value: str) -> str:
    """A template that replaces a text by what is twice as long, 60 times."""
    return START + "{% for i in range(60) %}{% set ns.x = " + value + " %}{% endfor %}{{ ns.x }}"


def nested(value: str, use: str) -> str:
    """A template that replaces a list by what holds it twice, 60 times."""
    return LIST + "{% for i in range(60) %}{% set ns.x = " + value + " %}{% endfor %}" + use


EXPENSIVE = {
    "loops": "{% for i in range(20000) %}{% for j in range(20000) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for i in range(20000) %}{% for j in range(20000) if j < 0 %}{% endfor %}{% endfor %}",
    "three loops": "{% for i in range(200) %}{% for j in range(200) %}{% for k in range(200) %}{{ i }}"
    + "{% endfor %}" * 3,
    "four loops": "{% for i in [1] %}" * 4 + "{% endfor %}" * 4,
    "text in loops": "{% for i in range(60000) %}" + "x" * 100 + "{% endfor %}",
    "output": "{% for i in range(150) %}" + "x" * 500 + "{% endfor %}",
    "captured text": "{% filter upper %}{% for i in range(60000) %}" + "x" * 100 + "{% endfor %}{% endfilter %}",
    "concat": doubled("ns.x ~ ns.x"),
    "plus": doubled("ns.x + ns.x"),
    "join filter": doubled("[ns.x, ns.x] | join"),
    "join separator": doubled("[1, 2, 3] | join(ns.x)"),
    "join method": doubled("ns.x.join(['', '', ''])"),
    "replace filter": doubled("ns.x | replace('', ns.x)"),
    "replace method": doubled("ns.x.replace('x', ns.x)"),
    "format method": doubled("'{0}{0}'.format(ns.x)"),
    "format filter": doubled("'%s%s' | format(ns.x, ns.x)"),
    "percent": doubled("'%s%s' % (ns.x, ns.x)"),
    "percent by name": doubled("'%(a)s%(a)s' % {'a': ns.x}"),
    "indent by text": doubled("ns.x | indent(ns.x, true)"),
    "set block": START
    + "{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + doubled("m(ns.x)"),
    "list plus": nested("ns.x + ns.x", "{{ ns.x | length }}"),
    "text of lists": nested("[ns.x, ns.x]", "{{ ns.x }}"),
    "text of tuples": nested("(ns.x, ns.x)", "{{ ns.x | string | length }}"),
    "json of dicts": nested("{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson }}"),
    "json of dict()": nested("dict(a=ns.x, b=ns.x)", "{{ ns.x | tojson }}"),
    "comparison": nested("[ns.x, ns.x]", "{{ ns.x == ns.x + [1] }}"),
    "arguments": "{% macro m() %}{{ m(varargs, varargs) }}{% endmacro %}{{ m(1) }}",
    "exponential macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(35) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "chain of macros": "{% macro m0() %}xxxx{% endmacro %}"
    + "".join(f"{{% macro m{i + 1}() %}}{{{{ m{i}() }}}}{{{{ m{i}() }}}}{{% endmacro %}}" for i in range(38))
    + "{{ m38() }}",
    "range": "{{ range(10 ** 9) | list }}",
    "text of a range": "{{ range(60000) | list | string }}",
    "map": "{{ range(60000) | map('default', 'x') | list }}",
    "filters in a loop": "{% set l = range(5000) | list %}{% for i in range(60000) %}"
    "{{ l | sort | first }}{% endfor %}",
    "tests in a loop": "{% set l = range(5000) | list %}{% for i in range(60000) %}"
    "{% if -1 in l %}{% endif %}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "product": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "round": "{{ 5 | round(-10 ** 9) }}",
    "round up": "{{ 5 | round(10 ** 9, 'ceil') }}",
    "width of str.format": "{{ '{:>500000000}'.format('x') }}",
    "nested width": "{{ '{:>{w}}'.format('x', w=500000000) }}",
    "indent": "{{ 'x' | indent(500000000) }}",
    "tojson": "{{ messages | tojson(indent=500000000) }}",
    "separators": LONG + "{{ messages | tojson(separators=(ns.x, ns.x)) }}",
    "strip": LONG + "{{ ns.x.strip('b' ~ ns.x) }}",
    "rfind": LONG + "{{ ns.x.rfind('ab' ~ ns.x[:9000]) }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep attributes": "{{ x" + ".a" * 5000 + " }}",
    "deep sum": "{{ 1" + " + 1" * 5000 + " }}",
    "deep blocks": "{% if x %}" * 3000 + "{% endif %}" * 3000,
    "integer of a text": LONG + "{{ ns.x | replace('x', 'f') | int(base=16) }}",
    "integer of 192 bits": "{{ 'ffffffffffffffffffffffffffffffffffffffffffffffff' | int(base=16) }}",
    "integer of a float": "{{ 1e300 | int }}",
    "literal": "{{ 0x" + "f" * 1000 + " }}",
    "tokens": "{{ x }}" * 100_000,
    "names": "".join(f"{{% set x{i} = 1 %}}" for i in range(2000)),
    "source": "{# #}" + "x" * 2**20,
}
REFUSED = {
    "product of a string": "{{ 'x' * 500000000 }}",
    "product with a string": "{{ 500000000 * 'x' }}",
    "product of a list": "{{ [1] * 500000000 }}",
    "width of %": "{{ '%500000000d' % 1 }}",
    "width in the arguments of %": "{{ '%*d' % (500000000, 1) }}",
    "key with parentheses": "{{ '%(1(%)2)399999999s' % {'1(%)2': 'x'} }}",
    "conversion behind a key with parentheses": "{{ '%(1(%)2)r' % {'1(%)2': 'x'} }}",
    "conversion": "{{ '%r' % 'x' }}",
    "end of %": "{{ '%5' % 1 }}",
    "width of the format filter": "{{ '%500000000s' | format('x') }}",
    "ljust": "{{ 'x'.ljust(500000000) }}",
    "zfill": "{{ 'x'.zfill(500000000) }}",
    "center": "{{ 'x' | center(500000000) }}",
    "batch": "{{ [1] | batch(500000000, 0) | list }}",
    "slice": "{{ [1] | slice(500000000) | list }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "sum of lists": "{{ [[1], [2]] | sum(start=[]) }}",
    "recursive loop": "{% for i in [[1]] recursive %}{{ loop(i) }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class by item": "{{ messages['__class__'] }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ messages | map(attribute='__class__') | list }}",
    "class by sort": "{{ messages | sort(attribute='__class__') }}",
    "class by format": "{{ '{0.__class__}'.format(1) }}",
    "class of loop": "{% for i in [1] %}{{ loop.__class__ }}{% endfor %}",
    "globals": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__ }}",
    "self": "{{ self.__init__ }}",
    "attribute of a number": "{{ (1).real }}",
    "change of a list": "{{ messages.append(1) }}",
    "change of a dict": "{{ messages[0].update(a=1) }}",
    "removal": "{{ messages[0].pop('role') }}",
    "call of a number": "{{ 1() }}",
    "text of a namespace": START + "{{ ns }}",
    "namespace in itself": START + "{% set ns.x = ns %}",
    "namespace in a list": START + "{% set x = [ns] %}",
    "hidden name": START + "{% set ns._x = 1 %}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block x %}{% endblock %}",
    "generation in generation": "{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}",
    "half a generation": "{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x[2:] }}",
}


def time_to_refusal(source: str) -> tuple[float, str]:
    messages = copy.deepcopy(MESSAGES)
    started = time.thread_time()
    with pytest.raises(CheckpointError) as error:
        ChatTemplate(source).render(messages)
    seconds = time.thread_time() - started
    assert messages == MESSAGES
    return seconds, str(error.value)


@pytest.mark.parametrize("source", EXPENSIVE.values(), ids=EXPENSIVE)
def test_expensive_templates_are_refused(source):
    seconds, message = time_to_refusal(source)
    assert "expensive" in message or "expected at most" in message
    assert seconds < 3  # under one in a process that has no garbage to collect meanwhile


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_what_templates_may_not_do(source):
    seconds, message = time_to_refusal(source)
    assert message.startswith("chat template")
    assert seconds < 3  # under one in a process that has no garbage to collect meanwhile


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\nb{% if x %}", "line 2: Unexpected end of template"),
        ("\n\n{{ x", "line 3: unexpected end of template"),
        ("{% foo %}", "line 1: Encountered unknown tag 'foo'"),
        ("\n{{ x | nofilter }}", "line 2: filter 'nofilter'; expected one of abs"),
        ("\n{{ x is notest }}", "line 2: test 'notest'; expected one of"),
        ("\n\n{{ a.b.c }}", "line 3: UndefinedError: 'a' is undefined"),
        ("{{ messages[9].content }}", "line 1: UndefinedError: list object has no element 9"),
        ("{{ messages[0].text.lower() }}", "line 1: UndefinedError: 'dict object' has no attribute 'text'"),
        ("{{ '' + none }}", "line 1: TypeError: "),
        ("\n{{ 'x'.center(3) }}", "line 2: str.center: not allowed"),
        ("{{ " + "1" * 5000 + " }}", "Exceeds the limit"),
        (LONG + "{{ ns.x | int(base=36) }}", "int of a text of 32768 characters; expected at most 64"),
    ],
)
def test_faults_are_told_with_their_line(source, message):
    assert message in time_to_refusal(source)[1]


@pytest.mark.parametrize(
    "value",
    ["ns.x | replace('', ns.x)", "ns.x.replace('x', ns.x)", "ns.x.join(range(9000))", "range(9000) | join(ns.x)"]
    + ["messages | tojson(indent=10 ** 8)", "'x' | indent(10 ** 8)", "'x'.ljust(10 ** 8)", "'x' * 10 ** 8"]
    + ["'%100000000d' % 1", "'{:100000000}'.format(1)", "ns.x ~ ns.x ~ ns.x ~ ns.x", "'{0}{0}{0}'.format(ns.x)"],
)
def test_large_values_are_refused_before_they_are_made(value):
    tracemalloc.start()
    try:
        time_to_refusal(LONG + "{{ " + value + " }}")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "operation", ["big ** 8", "big // 7", "1 + big", "big | abs", "[big] | sum", "big | int", "1e30 | round | int"]
)
def test_a_large_integer_is_not_computed_with(operation):
    with pytest.raises(CheckpointError, match="an integer of more than 64 bits"):
        ChatTemplate("{{ " + operation + " }}").render(MESSAGES, variables={"big": 2**65})


def test_a_large_integer_is_written():
    assert ChatTemplate("{{ big }}{{ [big] | tojson }}").render(MESSAGES, variables={"big": 2**65}).text == (
        f"{2**65}[{2**65}]"
    )


def test_a_fault_of_the_step_limit(monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 60)
    monkeypatch.setattr(guard, "MAX_STEPS", 1000)
    assert "more than 1000 operations" in time_to_refusal("{% for i in range(2000) %}{% endfor %}")[1]


def test_a_fault_of_the_depth_of_macros():
    assert "nested more than 40 deep" in time_to_refusal(EXPENSIVE["endless macro"])[1]


def test_all_values_together_are_bounded(monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 60)
    message = time_to_refusal(LONG + "{% for i in range(5000) %}{% set y = ns.x ~ i %}{% endfor %}")[1]
    assert "all values together" in message


def test_a_fault_of_the_time_limit(monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0)
    assert "0 s of processor time" in time_to_refusal("{{ messages }}")[1]


def test_a_pause_for_garbage_is_not_the_templates_fault(monkeypatch):
    clock = guard.Clock(0.5)
    times = iter([0.7, 1.4, 1.5])  # seconds of processor time at each look
    monkeypatch.setattr(guard.time, "thread_time", lambda: next(times))
    clock.check()
    clock.check()
    monkeypatch.setattr(guard, "STEP_SECONDS", 1)
    clock._left = 0.05
    with pytest.raises(guard.TooExpensive):
        clock.check()


def test_a_template_that_is_slow_to_compile(monkeypatch):
    monkeypatch.setattr(sandbox, "COMPILE_SECONDS", 0)
    assert "template too expensive" in time_to_refusal("{{ messages }}")[1]


def plain_jinja(source: str, variables: dict) -> str:
    """The text by Jinja's own sandbox, set up as Hugging Face sets it up."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **kwargs: json.dumps(
        value, ensure_ascii=ensure_ascii, **kwargs
    )
    return environment.from_string(source).render(**variables)


@pytest.mark.parametrize(
    "source",
    [
        "{{ missing }}|{{ missing is defined }}|{{ messages[7] }}|{{ messages.x }}|{{ messages[0].x is undefined }}",
        "{{ none }} {{ true }} {{ 1.5 }} {{ [1, 'a', none] }} {{ (1,) }} {{ {'a': 1} }}",
        "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{% for m in messages %}{{ loop.previtem is defined }}{{ loop.nextitem }}{{ loop.cycle(1, 2) }}{% endfor %}",
        "{% for k, v in messages[1].items() %}{{ k }}={{ v }};{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
        "{% for k, v in messages[1] | dictsort %}{{ k }}{% endfor %}{{ messages[1] | items | list }}",
        "{{ messages[2].calls | map(attribute='n') | list }}{{ messages[2].calls | sum(attribute='n') }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ messages | rejectattr('calls', 'defined') | map(attribute='role') | join(', ') }}",
        "{% if messages | selectattr('role', 'equalto', 'x') %}generators are true{% endif %}",
        "{% set x = messages | map(attribute='role') %}{{ x | list }}{{ x | list }}",
        "{{ messages[2].content.split(',') }}{{ messages[0].content.strip() }}{{ 'aXb'.lower().startswith('ax') }}",
        "{{ messages[1].content | replace('l', 'L') | indent(2) | upper }}{{ ' x ' | trim }}{{ 'ab' | title }}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[1] | tojson(ensure_ascii=true) }}",
        "{{ [3, 1, 2] | sort }}{{ [1, 1] | unique | list }}{{ 'abc' | reverse }}{{ [1, 2] | reverse | list }}",
        "{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ 'abc'[1:] }}{{ 'abc'[-1] }}{{ [1] + [2] }}",
        "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ -3 | abs }}{{ 7 / 2 }}{{ '3' | int + 1 }}{{ 2.567 | round(1) }}",
        "{{ '%s is %d, %.2f%%' % ('x', 3, 1.5) }}{{ '%s' | format('y') }}{{ '{0:>4}'.format('z') }}",
        "{{ '%-4d|%+d|%5s' | format(1, 2, 'x') }}{{ '%(a)s|%(b%c)05.1f%%' % {'a': 1, 'b%c': 2.25} }}",
        "{{ '7f' | int(base=16) }}{{ 'x' | int(3) }}{{ ' 4 ' | int }}{{ [1, 2] | sum }}{{ 2.5 | abs }}{{ -2 | abs }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(3) %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.l }}",
        "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% with y = 3 %}{{ y }}{% endwith %}",
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1) }}{{ m(1, 3, 4, c=5) }}",
        "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}x{% endcall %}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}q{{ x }}{% endfilter %}",
        "{{ messages[0].role is string }}{{ messages is iterable }}{{ messages is mapping }}{{ 1 is in [1] }}",
        "{{ messages[0].get('x', 'd') }}{{ messages[0].keys() | list }}{{ 'z' not in 'abc' }}",
        "{{ missing | default('d') }}{{ '' | default('e', true) }}{{ [1, 2] | first }}{{ [2, 1] | max }}",
        "{{ dict(a=1).a }}{{ 1 if missing else 2 }}{{ 1 < 2 < 3 }}{{ not true }}{{ 'a' ~ 1 ~ none ~ missing }}",
        "  {% if true %}\n  x\n  {% endif %}\n  {{- 'y' -}}  \n{# c #}\nz\n",
        "{{ '<b>' | safe }}{{ '<b>' }}{{ messages[1].content | length }}{{ ['a', 'b'] | join('-') }}",
    ],
)
def test_means_what_jinja_means(source):
    variables = {"messages": MESSAGES}
    assert CompiledTemplate(source).run(variables, 1000, datetime.datetime.now()) == plain_jinja(source, variables)


def test_nothing_is_escaped_for_html():
    # In Jinja `safe` makes what it is added to be escaped, which no chat template means.
    assert ChatTemplate("{{ '<b>' | safe + '&' }}").render(MESSAGES).text == "<b>&"


def test_items_of_a_dict_hide_no_method_and_methods_no_item():
    messages = [{"role": "user", "content": "x", "items": 3, "get": 4, "pop": 5}]
    source = (
        "{{ messages[0]['items'] }}{{ messages[0].items() | length }}{{ messages[0]['get'] }}{{ messages[0]['pop'] }}"
    )
    assert ChatTemplate(source + "{{ messages[0]['update'] }}").render(messages).text == "3545"


def test_the_time_is_told():
    now = datetime.datetime(2024, 7, 26, 9)
    assert CompiledTemplate("{{ strftime_now('%d %b %Y, %-H') }}").run({}, 0, now) == "26 Jul 2024, 9"


def test_a_large_honest_conversation():
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"<{i}> " * 50} for i in range(1000)]
    text = ChatTemplate("llama3.1").render(messages, special_tokens=["<|eot_id|>"]).text
    assert text.count("<|eot_id|>") == 1001


def test_a_large_message():
    text = "x < y \0 \u202e" * 100_000
    assert text in ChatTemplate("chatml").render([{"role": "user", "content": text}], special_tokens=["<s>"]).text
