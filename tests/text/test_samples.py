"""The forms in which samples come, and what is said of those that are none."""

import copy

import numpy as np
import pytest

from kllama.text.samples import read_samples

pytestmark = pytest.mark.backend_independent

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONG = [*CHAT, {"role": "user", "content": "c"}]
TOOL = {"type": "function", "function": {"name": "f"}}
PAIRS = {"prompts": ["a", "b"], "responses": ["c", "d"]}


@pytest.mark.parametrize(
    "x, columns, is_batch",
    [
        ("a", {"texts": ["a"]}, False),
        (("a", "b"), {"texts": ["a", "b"]}, True),
        (np.array(["a", "b"]), {"texts": ["a", "b"]}, True),
        ([], {"texts": []}, True),
        (PAIRS, PAIRS, True),
        ({"prompts": np.array(["a", "b"]), "responses": ("c", "d")}, PAIRS, True),
        ({"prompts": "a", "responses": "c"}, {"prompts": ["a"], "responses": ["c"]}, False),
        ([{"prompt": "a", "response": "c"}, {"prompt": "b", "response": "d"}], PAIRS, True),
        ({"prompt": ["a", "b"], "response": ["c", "d"]}, PAIRS, True),
        ([{"prompt": "a", "completion": "c", "id": 1}, {"prompt": "b", "completion": "d", "id": 2}], PAIRS, True),
        ([{"text": "a", "source": "x"}, {"text": "b"}], {"texts": ["a", "b"]}, True),
        ({"text": ["a", "b"]}, {"texts": ["a", "b"]}, True),
        ({"text": "a"}, {"texts": ["a"]}, False),
        (CHAT, {"messages": [CHAT], "tools": [None]}, False),
        ([CHAT, LONG], {"messages": [CHAT, LONG], "tools": [None, None]}, True),
        (
            [{"messages": CHAT, "id": 1}, {"messages": LONG, "tools": [TOOL]}],
            {"messages": [CHAT, LONG], "tools": [None, [TOOL]]},
            True,
        ),
        ({"messages": CHAT}, {"messages": [CHAT], "tools": [None]}, False),
        ({"messages": (tuple(CHAT), LONG)}, {"messages": [CHAT, LONG], "tools": [None, None]}, True),
        ({"messages": []}, {"messages": [], "tools": []}, True),
        ([{"messages": CHAT}, {"messages": LONG}], {"messages": [CHAT, LONG], "tools": [None, None]}, True),
        ({"messages": [CHAT, LONG], "tools": [TOOL]}, {"messages": [CHAT, LONG], "tools": [[TOOL], [TOOL]]}, True),
        (
            [{"messages": CHAT, "tools": [TOOL]}, {"messages": LONG, "tools": None}],
            {"messages": [CHAT, LONG], "tools": [[TOOL], None]},
            True,
        ),
        (
            {"messages": {"role": [["user", "assistant"]], "content": [["a", "b"]]}},
            {"messages": [CHAT], "tools": [None]},
            True,
        ),
        (
            {"messages": {"role": np.array(["user", "assistant"]), "content": np.array([b"a", b"b"], object)}},
            {"messages": [CHAT], "tools": [None]},
            False,
        ),
    ],
)
def test_forms(x, columns, is_batch):
    before = copy.deepcopy(x)
    samples = read_samples(x)
    assert samples.columns == columns and samples.is_batch is is_batch
    assert len(samples) == len(next(iter(columns.values())))
    if isinstance(x, dict):  # KH-T9
        assert str(x) == str(before)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (None, TypeError, "x = None"),
        (5, TypeError, r"x = 5 \(int\)"),
        (iter(["a"]), TypeError, "list_iterator"),
        (["a", None], TypeError, r"texts\[1\] = None"),
        (["a", 5], TypeError, r"texts\[1\] = 5"),
        ([b"a"], TypeError, r"texts\[0\] = b'a'"),
        ({"prompts": ["a", 5], "responses": ["b", "c"]}, TypeError, r"prompts\[1\] = 5"),
        ({"prompts": ["a"], "responses": [None]}, TypeError, r"responses\[0\] = None"),
        ({"prompts": ["a"], "responses": ["b", "c"]}, ValueError, "1 prompts and 2 responses"),
        ({"prompts": ["a"], "responses": "b"}, ValueError, "expected one for each"),
        ({"prompts": ["a"]}, TypeError, r"the keys \['prompts'\]"),
        ({"story": ["a"]}, TypeError, r"the keys \['story'\]"),
        ({"text": "a", "prompt": "b", "response": "c"}, TypeError, "the keys"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], ValueError, r"x\[1\] has the keys \['prompts'\]"),
        ({"messages": [{"role": ["user", "user"], "content": ["a", "b"]}]}, TypeError, "collate_fn=list"),
        ([{"prompt": "a", "response": "b"}, None], TypeError, r"texts\[0\] = \{"),
        ({"messages": "a"}, TypeError, "messages = 'a'"),
        ({"messages": [CHAT, "a"]}, TypeError, r"messages\[1\] = 'a'"),
        ({"messages": [CHAT, ["a"]]}, TypeError, r"messages\[1\] = \['a'\]"),
        ({"messages": [CHAT], "tools": TOOL}, TypeError, "tools = "),
        ({"messages": [CHAT], "tools": [[TOOL], None]}, ValueError, "1 conversations and tools for 2"),
        ({"messages": {"role": [["user"]]}}, TypeError, r"the columns \['role'\]"),
        ({"messages": {"role": [["user"]], "content": [["a", "b"]]}}, ValueError, r"messages\[0\] has 1 roles and 2"),
    ],
)
def test_what_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        read_samples(x)


def test_parts():
    assert read_samples(["a", "b", "c"]).part(1, 3) == ["b", "c"]
    assert read_samples(PAIRS).part(0, 1) == {"prompts": ["a"], "responses": ["c"]}
