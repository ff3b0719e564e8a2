"""What `generate` makes of conversations and of prompts that are too long."""

import copy

import pytest

import kllama
from tests.letters import chat_letters

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "b"}]


@pytest.fixture(scope="module")
def build():
    """Build a function (arguments of the preprocessor that differ) -> a model of the five letters, always the same."""
    arguments = {"vocabulary_size": 5, "num_layers": 1, "num_query_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    backbone = kllama.LlamaBackbone(**arguments, num_key_value_heads=1, max_sequence_length=12, initializer_range=0.5)

    def build(**options):
        tokenizer = chat_letters()
        return kllama.LlamaCausalLM(
            backbone, kllama.LlamaCausalLMPreprocessor(tokenizer, **{"sequence_length": 8} | options)
        )

    return build


def generated_ids(model, ids, num_new):
    outputs = model.generate({"token_ids": [ids]}, max_length=len(ids) + num_new, temperature=0, stop_token_ids=None)
    return outputs["token_ids"][0].tolist()


def test_conversations(build):
    model = build(sequence_length=10)
    prompt = [3, 0, 1, 2, 2, 4, 1, 2]  # KH-T4: one start token
    expected = generated_ids(model, prompt, 2)
    options = {"temperature": 0, "stop_token_ids": None}
    inputs = {"messages": CHAT}
    before = copy.deepcopy(inputs)
    whole = model.generate(inputs, **options)
    assert inputs == before  # KH-T9
    tokenizer = model.preprocessor.tokenizer
    assert whole == tokenizer.detokenize(expected, skip_special_tokens=True)
    reply = tokenizer.detokenize(expected[8:], skip_special_tokens=True)
    assert model.generate(inputs, strip_prompt=True, **options) == reply
    assert model.generate({"messages": [CHAT, CHAT]}, strip_prompt=True, **options) == [reply, reply]
    assert model.generate({"messages": []}) == []


def test_tools(build):
    model = build(sequence_length=12)
    inputs = {"messages": CHAT, "tools": [{"type": "function"}]}
    options = {"temperature": 0, "stop_token_ids": None, "strip_prompt": True, "max_new_tokens": 2}
    expected = generated_ids(model, [3, 0, 0, 1, 2, 2, 4, 1, 2], 2)[9:]
    assert model.generate(inputs, **options) == model.preprocessor.tokenizer.detokenize(
        expected, skip_special_tokens=True
    )


@pytest.mark.parametrize("side, kept", [("left", [3, 1, 2, 0, 1, 2, 0]), ("right", [3, 0, 1, 2, 0, 1, 2])])
def test_prompts_that_are_cut(build, side, kept):
    model = build(truncate=side)
    long, short = "abc" * 3 + "a", "ab"
    options = {"temperature": 0, "stop_token_ids": None}
    texts = model.generate([long, short], **options)
    tokenizer = model.preprocessor.tokenizer
    assert texts[0] == tokenizer.detokenize(generated_ids(model, kept, 1), skip_special_tokens=True)
    assert texts[1] == tokenizer.detokenize(generated_ids(model, [3, 0, 1], 5), skip_special_tokens=True)
    # The limit of the call: one place is left for a new token.
    start = 3 if side == "right" else 4
    ids = [3, 0, 1, 2] if side == "right" else [3, 1, 2, 0]
    expected = tokenizer.detokenize(generated_ids(model, ids, 1)[start + (side == "right") :], skip_special_tokens=True)
    assert model.generate(long, max_length=5, strip_prompt=True, **options) == expected


def test_prompts_that_are_cut_to_the_positions_of_the_model(build):
    options = {"temperature": 0, "stop_token_ids": None, "max_new_tokens": 4, "strip_prompt": True}
    text = "abc" * 6  # 19 tokens; the model has 12 positions
    with pytest.raises(ValueError, match="the model has 12"):
        build().generate(text, **options)
    model = build(truncate="left")
    expected = generated_ids(model, [3, 2, 0, 1, 2, 0, 1, 2], 4)[8:]
    tokenizer = model.preprocessor.tokenizer
    assert model.generate(text, **options) == tokenizer.detokenize(expected, skip_special_tokens=True)


def test_prompts_that_are_too_long_are_refused(build):
    # KH-T7
    for inputs in ("abc" * 4, {"messages": [{"role": "user", "content": "abc" * 4}]}):
        with pytest.raises(ValueError, match="the prompt has 1[34] tokens, max_length is 8.*truncate='left'"):
            build().generate(inputs)


def test_start_token_is_honoured(build):
    # KH-T4
    model = build(add_start_token=False)
    text = model.generate("ab", temperature=0, stop_token_ids=None)
    expected = generated_ids(model, [0, 1], 6)
    assert text == model.preprocessor.tokenizer.detokenize(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    "inputs", [{"messages": "ab"}, {"messages": [CHAT, "ab"]}, {"messages": [["ab"]]}, 5, ["a", 5]]
)
def test_what_is_refused(build, inputs):
    with pytest.raises(TypeError):
        build().generate(inputs)
