"""Chat templates against recorded conversations: text, errors, ids, what the assistant wrote, and wrong messages."""

import copy
import functools
import json
from pathlib import Path

import pytest
import tokenizers

from kllama.errors import CheckpointError
from kllama.text.chat.encoder import ChatEncoder
from kllama.text.chat.template import BUILT_IN, ChatTemplate, suggest_template

pytestmark = pytest.mark.backend_independent

GOLDENS = Path(__file__).resolve().parents[4] / "shared" / "assets" / "goldens" / "chat"
CASES = json.loads((GOLDENS / "cases.json").read_text())["cases"] if GOLDENS.is_dir() else []
FAMILIES = {
    "llama-2-chat": "llama2",
    "llama-3-instruct": "llama3",
    "llama-3.1-instruct": "llama3.1",
    "chatml": "chatml",
    "chatml-generation-tags": "chatml",
    "vicuna-v1.1": "vicuna",
    "mistral-v3": "mistral",
}
LLAMA2, LLAMA3, SMOLLM2 = "models/stories15M", "tokenizers/llama3_2", "models/smollm2-135m-instruct"
TURNS = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": " Hi there "},
    {"role": "user", "content": "Who"},
    {"role": "assistant", "content": "Me\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"b": 1, "a": [2]}}}]
CALL = {"role": "assistant", "tool_calls": [{"id": "123456789", "function": {"name": "f", "arguments": {"x": "ü"}}}]}


def golden(name: str) -> str:
    return (GOLDENS / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def vocabulary(assets, folder) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(assets / folder / "tokenizer.json"))


@functools.cache
def encoder(assets, folder) -> ChatEncoder:
    return ChatEncoder(vocabulary(assets, folder))


def render_case(template, case, **kwargs):
    names = "messages tools add_generation_prompt continue_final_message bos_token eos_token variables".split()
    return ChatTemplate(template).render(**{name: case[name] for name in names}, **kwargs)


class TestGoldens:
    def check(self, assets, template, case):
        if "expected_error" in case:
            with pytest.raises(ValueError, match="refuses them") as error:
                render_case(template, case)
            assert case["expected_error"] in str(error.value)
            assert not isinstance(error.value, CheckpointError)
            return
        folder = str(Path(case["tokenizer"]).parent) if "tokenizer" in case else None
        special = encoder(assets, folder).special_tokens if folder else ()
        chat = render_case(template, case, special_tokens=special, find_assistant="assistant_spans" in case)
        assert chat.text == case["expected"]
        if "assistant_spans" in case:
            assert [list(span) for span in chat.assistant_spans] == case["assistant_spans"]
        if folder:
            assert encoder(assets, folder).encode(chat)[0] == case["ids"]

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
    def test_templates_of_models(self, assets, case):
        self.check(assets, golden(Path(case["template"]).stem), case)

    @pytest.mark.parametrize(
        "case", [case for case in CASES if Path(case["template"]).stem in FAMILIES], ids=lambda case: case["name"]
    )
    def test_built_in_templates(self, assets, case):
        self.check(assets, FAMILIES[Path(case["template"]).stem], case)

    @pytest.mark.parametrize("prompt", [False, True])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_built_in_equals_its_family(self, assets, name, prompt):
        kwargs = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": prompt}
        for messages in (TURNS, TURNS[1:], TURNS[:4], TURNS[1:2]):
            if name == "mistral-v3" and messages == TURNS:
                continue  # the template of the model drops a system message that comes with an answer
            expected = ChatTemplate(golden(name)).render(messages, **kwargs).text
            assert ChatTemplate(FAMILIES[name]).render(messages, **kwargs).text == expected

    @pytest.mark.parametrize("name", ["llama-3.1-instruct", "mistral-v3"])
    def test_built_in_tools_equal_their_family(self, assets, name):
        result = {"role": "tool", "content": "[1]", "tool_call_id": "123456789"}
        messages = [*TURNS[:2], CALL, result, TURNS[2], TURNS[3]]
        for number in range(2, 7):
            if name == "mistral-v3" and messages[number - 1]["role"] != "user":
                continue  # the template of the model drops a system message that comes with an answer
            expected = ChatTemplate(golden(name)).render(messages[:number], tools=TOOLS).text
            assert ChatTemplate(FAMILIES[name]).render(messages[:number], tools=TOOLS).text == expected

    def test_mistral_keeps_the_system_message_before_an_answer(self):
        template, kwargs = ChatTemplate("mistral"), {"bos_token": "<s>", "eos_token": "</s>"}
        prompt = template.render(TURNS[:2], add_generation_prompt=True, **kwargs).text
        assert prompt == "<s>[INST] Be brief\n\nHello[/INST]"
        assert template.render(TURNS[:3], **kwargs).text == prompt + " Hi there</s>"

    def test_ids_of_meta_llama2(self, assets):
        template, encode = ChatTemplate("llama2"), encoder(assets, LLAMA2)
        for case in json.loads((GOLDENS / "meta_reference_ids.json").read_text())["llama2"]:
            chat = template.render(
                case["messages"], bos_token="<s>", eos_token="</s>", special_tokens=encode.special_tokens
            )
            assert encode.encode(chat)[0] == case["ids"]

    def test_ids_of_meta_llama3(self, assets):
        template, encode = ChatTemplate("llama3"), encoder(assets, LLAMA3)
        for case in json.loads((GOLDENS / "meta_reference_ids.json").read_text())["llama3"]:
            chat = template.render(
                case["messages"],
                bos_token="<|begin_of_text|>" if case["whole_dialog"] else "",
                add_generation_prompt=case["whole_dialog"],
                special_tokens=encode.special_tokens,
            )
            assert encode.encode(chat)[0] == case["ids"]


class TestAssistant:
    # Template: (folder of a vocabulary, tokens that the assistant wrote in TURNS).
    MASKED = {
        "llama2": (LLAMA2, ["▁Hi", "▁there", "▁", "</s>", "▁Me", "▁", "</s>"]),
        "llama-2-chat": (LLAMA2, ["▁Hi", "▁there", "▁", "</s>", "▁Me", "▁", "</s>"]),
        "llama3": (LLAMA3, ["Hi", "Ġthere", "<|eot_id|>", "Me", "<|eot_id|>"]),
        "llama-3-instruct": (LLAMA3, ["Hi", "Ġthere", "<|eot_id|>", "Me", "<|eot_id|>"]),
        "llama-3.2-instruct": (LLAMA3, ["Hi", "Ġthere", "<|eot_id|>", "Me", "<|eot_id|>"]),
        "chatml": (SMOLLM2, ["ĠHi", "Ġthere", "Ġ", "<|im_end|>", "Me", "Ċ", "<|im_end|>"]),
        "smollm2-instruct": (SMOLLM2, ["ĠHi", "Ġthere", "Ġ", "<|im_end|>", "Me", "Ċ", "<|im_end|>"]),
    }

    @pytest.mark.parametrize("name", MASKED)
    def test_mask(self, assets, name):
        folder, expected = self.MASKED[name]
        encode = encoder(assets, folder)
        bos, eos = ("<s>", "</s>") if folder == LLAMA2 else ("", "")
        chat = ChatTemplate(name if name in BUILT_IN else golden(name)).render(
            TURNS, bos_token=bos, eos_token=eos, special_tokens=encode.special_tokens, find_assistant=True
        )
        ids, mask = encode.encode(chat)
        assert len(ids) == len(mask)
        written = [token_id for token_id, is_written in zip(ids, mask, strict=True) if is_written]
        assert [vocabulary(assets, folder).id_to_token(token_id) for token_id in written] == expected

    def test_tool_calls_are_the_assistants(self):
        chat = ChatTemplate("llama3.1").render([TURNS[1], CALL], find_assistant=True)
        assert [chat.text[start:stop] for start, stop in chat.assistant_spans] == [
            '{"name": "f", "parameters": {"x": "ü"}}<|eot_id|>'
        ]

    @pytest.mark.parametrize("name", ["mistral-v3", "llama-3-instruct-original"])
    def test_a_template_that_rewrites_what_came_before_is_refused(self, assets, name):
        with pytest.raises(ValueError, match=r"messages\[2\].*generation"):
            ChatTemplate(golden(name)).render(TURNS, find_assistant=True)

    def test_a_template_that_refuses_the_beginning(self):
        source = "{% if messages | length == 1 %}{{ raise_exception('no') }}{% endif %}x"
        with pytest.raises(ValueError, match="cannot be found: the chat template refuses .*: no") as error:
            ChatTemplate(source).render(TURNS[1:3], find_assistant=True)
        assert not isinstance(error.value, CheckpointError)

    def test_a_template_that_is_too_expensive_for_the_beginning(self):
        loops = "{% for i in range(65000) %}{% for j in range(65000) %}x{% endfor %}{% endfor %}"
        source = "{% if messages | length == 1 %}" + loops + "{% endif %}x"
        with pytest.raises(CheckpointError, match="too expensive"):
            ChatTemplate(source).render(TURNS[1:3], find_assistant=True)

    def test_nothing_is_sought_unless_asked_for(self, assets):
        assert ChatTemplate(golden("mistral-v3")).render(TURNS).assistant_spans is None

    def test_left_open_turn(self):
        chat = ChatTemplate("llama3").render(TURNS, continue_final_message=True, find_assistant=True)
        assert chat.text.endswith("\n\nMe")
        assert chat.assistant_spans[-1] == (len(chat.text) - 2, len(chat.text))


class TestContinue:
    @pytest.mark.parametrize("content", ["", "  ", "\n", "Roses are ", "Roses\n"])
    def test_only_the_contents_own_space_is_stripped(self, assets, content):
        messages = [TURNS[1], {"role": "assistant", "content": content}]
        for name in ("llama3", golden("llama-3-instruct")):
            text = ChatTemplate(name).render(messages, continue_final_message=True).text
            assert text.endswith("assistant<|end_header_id|>\n\n" + content.strip())

    def test_a_template_that_does_not_strip(self):
        text = ChatTemplate("chatml").render(TURNS[:3], continue_final_message=True).text
        assert text.endswith("<|im_start|>assistant\n Hi there ")

    def test_refusals(self):
        with pytest.raises(ValueError, match="add_generation_prompt"):
            ChatTemplate("chatml").render(TURNS, continue_final_message=True, add_generation_prompt=True)
        with pytest.raises(ValueError, match=r"messages\[1\]\['content'\] = None"):
            ChatTemplate("llama3.1").render([TURNS[1], CALL], continue_final_message=True)
        with pytest.raises(ValueError, match="does not write the end"):
            ChatTemplate("{{ messages[0].content[:2] }}").render(TURNS, continue_final_message=True)


class TestMessages:
    USER = {"role": "user", "content": "x"}

    @pytest.mark.parametrize(
        ("messages", "error", "message"),
        [
            ("Hello", TypeError, "messages = 'Hello'; expected a list"),
            ({"role": "user", "content": "x"}, TypeError, "expected a list"),
            ([], ValueError, "at least one message"),
            ([USER, "x"], TypeError, r"messages\[1\] = 'x'; expected a dict"),
            ([USER, {"content": "x"}], ValueError, r"messages\[1\]\['role'\] = None; expected one of system, user"),
            ([{"role": "bot", "content": "x"}], ValueError, r"messages\[0\]\['role'\] = 'bot'; expected one of"),
            ([{"role": ["user"], "content": "x"}], ValueError, r"\['role'\] = \['user'\]"),
            ([USER, {"role": "user"}], ValueError, r"messages\[1\]\['content'\] = None; expected a str"),
            ([USER, {"role": "user", "content": 3}], TypeError, r"messages\[1\]\['content'\] = 3"),
            ([{"role": "user", "content": b"x"}], TypeError, r"messages\[0\]\['content'\] = b'x'"),
            ([{"role": "user", "content": [{"type": "image"}]}], TypeError, r"\['content'\]"),
            ([{"role": "user", "content": "x", "at": object()}], TypeError, r"messages\[0\]\['at'\]"),
            ([{"role": "user", "content": "x", "at": {1: 2}}], TypeError, "key 1"),
            ([{"role": "assistant", "content": None, "tool_calls": []}], ValueError, r"\['content'\] = None"),
            ([{"role": "assistant", "tool_calls": "f()"}], TypeError, r"\['tool_calls'\] = 'f\(\)'"),
            ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}], ValueError, r"messages\[1\]"),
        ],
    )
    def test_wrong_messages(self, messages, error, message):
        with pytest.raises(error, match=message) as caught:
            ChatTemplate("chatml").render(messages)
        assert not isinstance(caught.value, CheckpointError)

    def test_a_message_that_holds_itself(self):
        loop = []
        loop.append(loop)
        with pytest.raises(ValueError, match="nested more than"):
            ChatTemplate("chatml").render([{**self.USER, "at": loop}])

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"tools": [lambda city: city]}, TypeError, r"tools\[0\].*JSON schema"),
            ({"tools": {}}, TypeError, "tools = {}"),
            ({"documents": ["x"]}, TypeError, r"documents\[0\]"),
            ({"variables": {"messages": 1}}, ValueError, r"variables\['messages'\]"),
            ({"variables": [1]}, TypeError, "variables"),
            ({"bos_token": None}, TypeError, "bos_token = None"),
        ],
    )
    def test_wrong_arguments(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            ChatTemplate("chatml").render([self.USER], **kwargs)

    def test_nothing_of_the_callers_is_changed(self):
        given = {
            "messages": [*TURNS[:2], CALL],
            "tools": TOOLS,
            "variables": {"date_string": "<|eot_id|>", "builtin_tools": ["f"]},
        }
        before = copy.deepcopy(given)
        ChatTemplate("llama3.1").render(**given, special_tokens=["<|eot_id|>"])
        assert given == before

    def test_text_parts_are_joined(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        text = ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": parts}]).text
        assert text == "ab"

    def test_surrogates_and_noncharacters_become_replacement_characters(self):
        text = ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": "a\ud800\ufdd0b\0"}]).text
        assert text == "a\ufffd\ufffdb\0"

    def test_tags_of_llama2_in_a_users_text_are_refused(self):
        with pytest.raises(ValueError, match=r"\[/INST\]"):
            ChatTemplate("llama2").render([{"role": "user", "content": "a [/INST] b"}])


class TestWhatATemplateDoesNotKnow:
    WRITES_NONE = "{% for message in messages %}{{ message.content }}{% endfor %}"

    @pytest.mark.parametrize("name", ["tools", "documents"])
    def test_tools_and_documents(self, name):
        with pytest.raises(ValueError, match=f"{name}: the chat template knows none") as error:
            ChatTemplate(self.WRITES_NONE).render(TURNS, **{name: TOOLS})
        assert not isinstance(error.value, CheckpointError)
        for nothing in (None, []):
            assert ChatTemplate(self.WRITES_NONE).render(TURNS[:2], **{name: nothing}).text == "Be briefHello"
        knows = self.WRITES_NONE + "{{ " + name + " | length }}"
        assert ChatTemplate(knows).render(TURNS[:2], **{name: TOOLS}).text == "Be briefHello1"

    def test_tool_calls(self):
        with pytest.raises(ValueError, match=r"messages\[1\]\['tool_calls'\]: the chat template knows no tool calls"):
            ChatTemplate(self.WRITES_NONE).render([TURNS[1], CALL])
        no_calls = {**TURNS[2], "tool_calls": []}
        assert ChatTemplate(self.WRITES_NONE).render([TURNS[1], no_calls]).text == "Hello Hi there "

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_built_in(self, name):
        template, knows = ChatTemplate(name), name in ("llama3.1", "mistral")
        for messages, tools in ((TURNS[1:2], TOOLS), ([TURNS[1], CALL], None)):
            if knows:
                assert '"f"' in template.render(messages, tools=tools).text
            else:
                with pytest.raises(ValueError, match="the chat template knows no"):
                    template.render(messages, tools=tools)
        with pytest.raises(ValueError, match="documents"):
            template.render(TURNS[1:2], documents=[{"text": "x"}])

    @pytest.mark.parametrize("call", [CALL, {**CALL, "content": None, "name": None}])
    def test_what_is_none_is_not_there(self, call):
        source = "{{ messages[1].content }}{{ messages[1].name is defined }}{{ messages[1].tool_calls | length }}"
        assert ChatTemplate(source).render([TURNS[1], call]).text == "False1"
        for name in ("llama3.1", "mistral"):
            assert "None" not in ChatTemplate(name).render([TURNS[1], call]).text


def test_a_name_that_is_no_template():
    with pytest.raises(ValueError, match="chat_template = 'llama4'; expected Jinja text, or one of llama2"):
        ChatTemplate("llama4")
    with pytest.raises(TypeError, match="chat_template = 3"):
        ChatTemplate(3)


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (["<|start_header_id|>", "<|eot_id|>", "<|python_tag|>", "x"], "llama3.1"),
        (["<|start_header_id|>", "<|eot_id|>"], "llama3"),
        (["<|im_start|>", "<|im_end|>"], "chatml"),
        (["[INST]", "[/INST]", "<s>", "</s>", "<unk>"], "mistral"),
        (["<s>", "</s>", "<unk>"], "llama2"),
        (["<|endoftext|>"], None),
    ],
)
def test_suggestions(tokens, name):
    assert suggest_template(tokens) == name
