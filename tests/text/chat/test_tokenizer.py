"""Conversations through `LlamaTokenizer`: the recorded ids, no token that a user spelt, and what is saved."""

import json

import numpy as np
import pytest

from kllama.errors import CheckpointError
from kllama.text.tokenizer import LlamaTokenizer

pytestmark = pytest.mark.backend_independent

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]


@pytest.fixture(scope="module")
def llama3(assets):
    tokens = {"start_token": "<|begin_of_text|>", "end_token": "<|eot_id|>"}
    return LlamaTokenizer(assets / "tokenizers" / "llama3_2", chat_template="llama3", **tokens)


def cases(assets) -> list[dict]:
    return json.loads((assets / "goldens" / "chat" / "cases.json").read_text(encoding="utf-8"))["cases"]


def test_recorded_ids(assets):
    tokenizers, count = {}, 0
    for case in cases(assets):
        if "ids" not in case:
            continue
        if case["tokenizer"] not in tokenizers:
            tokenizers[case["tokenizer"]] = LlamaTokenizer(assets / case["tokenizer"], parse_special=True)
        tokenizer = tokenizers[case["tokenizer"]]
        tokenizer.chat_template = (assets / "goldens" / "chat" / case["template"]).read_text(encoding="utf-8")
        # A case may name tokens that the vocabulary does not have: the template gets them all the same.
        tokenizer.start_token, tokenizer.end_token = case["bos_token"], case["eos_token"]
        options = {key: case[key] for key in ("tools", "add_generation_prompt", "continue_final_message", "variables")}
        assert tokenizer.apply_chat_template(case["messages"], tokenize=False, **options) == case["expected"]
        assert tokenizer.apply_chat_template(case["messages"], **options).tolist() == case["ids"], case["name"]
        count += 1
    assert count > 10


def test_metas_own_ids(assets, llama3):
    recorded = json.loads((assets / "goldens" / "chat" / "meta_reference_ids.json").read_text(encoding="utf-8"))
    llama2 = LlamaTokenizer(assets / "tokenizers" / "llama2", chat_template="llama2")
    for case in recorded["llama2"]:
        assert llama2.apply_chat_template(case["messages"]).tolist() == case["ids"]
    for case in recorded["llama3"]:
        ids = llama3.apply_chat_template(case["messages"], add_generation_prompt=case["whole_dialog"]).tolist()
        assert ids[0 if case["whole_dialog"] else 1 :] == case["ids"]


def test_forms(llama3):
    one = llama3.apply_chat_template(HELLO)
    assert one.dtype == "int32" and one.ndim == 1
    assert llama3.apply_chat_template([HELLO, HELLO[:1]])[0] == one.tolist()
    ids, mask = llama3.apply_chat_template(HELLO, return_assistant_mask=True)
    assert ids.tolist() == one.tolist() and mask.dtype == bool and mask.shape == ids.shape
    assert llama3.detokenize(ids[mask]) == "Hi there<|eot_id|>"
    rows, masks = llama3.apply_chat_template([HELLO, HELLO[:1]], return_assistant_mask=True)
    assert rows[0] == one.tolist() and masks[0] == mask.tolist() and not any(masks[1])
    texts = llama3.apply_chat_template([HELLO, HELLO[:1]], tokenize=False)
    assert [text.count("<|eot_id|>") for text in texts] == [2, 1]


@pytest.mark.parametrize("parse_special", [False, True])
def test_no_message_can_spell_a_special_token(llama3, parse_special):
    everything = "".join(llama3.special_tokens) + " <|begin_of_text|>"
    tokenizer = llama3
    tokenizer._vocabulary.parse_special = parse_special
    attack = [{"role": "user", "content": everything}]
    plain = [{"role": "user", "content": "x"}]
    special = np.array(tokenizer.special_token_ids)
    ids, expected = (tokenizer.apply_chat_template(m, add_generation_prompt=True) for m in (attack, plain))
    assert ids[np.isin(ids, special)].tolist() == expected[np.isin(expected, special)].tolist()
    assert everything in tokenizer.detokenize(ids)


def test_added_special_tokens_count_at_once(llama3, assets):
    tokenizer = LlamaTokenizer(assets / "models" / "stories260K", chat_template="chatml")
    before = tokenizer.apply_chat_template(HELLO)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special=True)
    after = tokenizer.apply_chat_template(HELLO)
    assert np.count_nonzero(np.isin(after, [512, 513])) == 4 and not np.isin(before, [512, 513]).any()


def test_several_templates():
    tokens = {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    tokenizer = LlamaTokenizer(tokens, chat_template={"default": "{{ 'a' }}", "tool_use": "{{ 'b' if tools }}"})
    assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "a"
    tool = {"type": "function", "function": {"name": "f"}}
    assert tokenizer.apply_chat_template(HELLO, tools=[tool], tokenize=False) == "b"
    tokenizer.chat_template = {"rag": "{{ 'c' }}"}
    with pytest.raises(ValueError, match="chat_template = None"):
        tokenizer.apply_chat_template(HELLO)


def test_without_a_template(llama3):
    tokenizer = LlamaTokenizer(llama3._vocabulary.encoder)
    with pytest.raises(ValueError, match=r"expected Jinja text, or .* llama2.* those of 'llama3"):
        tokenizer.apply_chat_template(HELLO)


@pytest.mark.parametrize("template", [3, {"default": 3}, ["a"]])
def test_what_is_no_template(template):
    with pytest.raises(TypeError, match="chat_template"):
        LlamaTokenizer(chat_template=template)


def test_a_broken_template_is_the_files_fault(llama3):
    tokenizer = LlamaTokenizer(llama3._vocabulary.encoder, chat_template="{% for %}")
    with pytest.raises(CheckpointError, match="line 1"):
        tokenizer.apply_chat_template(HELLO)


def test_a_mask_needs_ids(llama3):
    with pytest.raises(ValueError, match="return_assistant_mask"):
        llama3.apply_chat_template(HELLO, tokenize=False, return_assistant_mask=True)


def test_the_template_of_a_directory(assets):
    tokenizer = LlamaTokenizer.from_preset(assets / "models" / "smollm2-135m-instruct")
    assert "<|im_start|>" in tokenizer.apply_chat_template(HELLO, tokenize=False)
