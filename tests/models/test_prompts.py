"""What `generate` makes of conversations and of prompts that are too long."""

import copy

import keras
import numpy as np
import pytest

import kllama
from tests.letters import chat_letters, letters

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "b"}]


@pytest.fixture(scope="module")
def build():
    """Build a function (arguments of the preprocessor that differ) -> a model of the five letters, always the same."""
    backbone = make_backbone()
    return lambda **options: make_model(backbone, **options)


@pytest.fixture
def model():
    """A model of its own, to be changed."""
    return make_model(make_backbone(), sequence_length=10)


def make_backbone():
    keras.utils.set_random_seed(1)
    arguments = {"vocabulary_size": 5, "num_layers": 1, "num_query_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    return kllama.LlamaBackbone(**arguments, num_key_value_heads=1, max_sequence_length=12, initializer_range=0.5)


def make_model(backbone, **options):
    preprocessor = kllama.LlamaCausalLMPreprocessor(chat_letters(), **{"sequence_length": 8} | options)
    return kllama.LlamaCausalLM(backbone, preprocessor)


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
    whole = model.generate(inputs, strip_prompt=False, **options)
    assert inputs == before  # KH-T9
    tokenizer = model.preprocessor.tokenizer
    assert whole == tokenizer.detokenize(expected, skip_special_tokens=True)
    reply = tokenizer.detokenize(expected[8:], skip_special_tokens=True)
    assert model.generate(inputs, strip_prompt=True, **options) == reply
    for several in ({"messages": [CHAT, CHAT]}, [CHAT, CHAT], [{"messages": CHAT}, {"messages": CHAT, "id": 5}]):
        assert model.generate(several, **options) == [reply, reply]
    assert model.generate(CHAT, **options) == model.generate(inputs, **options) == reply
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


def test_the_token_that_ends_a_turn_stops_a_conversation(model):
    tokenizer = model.preprocessor.tokenizer
    assert tokenizer.turn_end_token_id == 4
    # An end of a turn that the tokenizer does not name as its end token.
    tokenizer.end_token, tokenizer.chat_template = None, tokenizer.chat_template.replace("eos_token", "'</s>'")
    head = model.backbone.token_embedding.reverse_embeddings
    head.assign(np.zeros(head.shape))
    bias = np.zeros(head.shape, "float32")
    rows = model.preprocessor.prompt_rows({"messages": CHAT})
    token_ids = np.array(rows, "int32")
    hidden = model.backbone.predict({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}, verbose=0)
    bias[:, 4] = hidden[0, -1]
    head.assign(bias)
    finish = model.preprocessor.generate_postprocess
    model.preprocessor.generate_postprocess = lambda x: finish(x, skip_special_tokens=False)
    stopped, unstopped = (model.generate(CHAT, temperature=0, stop_token_ids=ids) for ids in ("auto", None))
    assert stopped == "</s>" and unstopped.startswith("</s>") and len(unstopped) > len(stopped)


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content }}{% endfor %}x"],
)
def test_templates_that_show_no_end_of_a_turn(template):
    if template is None:
        with pytest.raises(ValueError, match="chat_template = None"):
            letters().apply_chat_template(CHAT)
    assert letters(chat_template=template).turn_end_token_id is None


class TestVocabulary:
    """A tokenizer with more tokens than the model has rows for: on JAX the weights would become NaN."""

    @pytest.fixture
    def model(self, model):
        model.preprocessor.tokenizer.add_tokens("d")
        return model

    @pytest.mark.parametrize("method", ["fit", "evaluate", "predict", "generate"])
    def test_text_is_refused(self, model, method):
        with pytest.raises(ValueError, match=r"6 tokens, the model 5 rows.*resize_vocabulary\(6\)"):
            getattr(model, method)(["ad", "ab"])

    def test_batches_are_refused(self, model):
        with pytest.raises(ValueError, match=r"resize_vocabulary\(6\)"):
            model.fit(iter_batches(["ad", "ab"]), verbose=0)

    def test_saving_is_refused(self, model, tmp_path):
        with pytest.raises(ValueError, match=r"resize_vocabulary\(6\)"):
            model.save_to_preset(tmp_path / "preset")
        assert not (tmp_path / "preset").exists()

    @pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
    @pytest.mark.parametrize("token_id", [5, -1])
    def test_ids_without_a_row(self, build, method, token_id):
        with pytest.raises(ValueError, match=f"token id {token_id}; expected ids from 0 to 4"):
            getattr(build(sequence_length=10), method)(np.array([[0, token_id, 1]]))

    def test_after_resizing_all_is_well(self, model, tmp_path):
        model.resize_vocabulary(6)
        assert np.isfinite(model.fit(["ad", "ab"], verbose=0).history["loss"][0])
        model.save_to_preset(tmp_path / "preset")


def iter_batches(batch):
    yield batch
