"""Stop strings of `generate`: the cut, the ids, the loops, and how much work stands behind the cut."""

import keras
import keras_hub
import numpy as np
import pytest

import kllama
from kllama.generation.decoding import Decoding
from kllama.models.stop_text import StopText
from tests.letters import letters

GREEDY = {"temperature": 0, "stop_token_ids": None}
PROMPTS = ["Once upon a time", "Lily and her dog went to the park", "One day, a boy"]


def count_tokens(monkeypatch):
    """Note how many tokens the engine reads in each chunk."""
    sizes, read = [], Decoding._read

    def noting(*arguments):
        chunk = read(*arguments)
        sizes.append(chunk.tokens.shape[1])
        return chunk

    monkeypatch.setattr(Decoding, "_read", noting)
    return sizes


def cut(text, prompt, strings):
    """The text up to the stop string that is whole first after the prompt."""
    new = text[len(prompt) :]
    ends = [(new.find(string) + len(string), -len(string)) for string in strings if string in new]
    return text[: len(prompt) + sum(min(ends))] if ends else text


def write(model, prompts, **arguments):
    """Everything in one way, so that few programs are compiled."""
    return model.generate(prompts, max_new_tokens=40, return_dict=True, **GREEDY, **arguments)


@pytest.mark.parametrize(
    "strings",
    [[" there was"], ["her mom", "Lily", "."], ["e"], ["was", "as a"], ["upon a time"], ["\n", "?!"]],
    ids=str,
)
def test_text_is_cut_before_them(stories260k, strings):
    texts = write(stories260k, PROMPTS)["texts"]
    expected = [cut(text, prompt, strings) for text, prompt in zip(texts, PROMPTS, strict=True)]
    result = write(stories260k, PROMPTS, stop_strings=strings)
    assert result["texts"] == expected
    is_cut = [len(cut) < len(text) for cut, text in zip(expected, texts, strict=True)]
    assert result["finish_reasons"] == ["stop" if is_cut else "length" for is_cut in is_cut]
    stripped = write(stories260k, PROMPTS, stop_strings=strings, strip_prompt=True)["texts"]
    # A tokenizer of this kind begins a text of its own without a space.
    assert stripped == [text[len(prompt) :].removeprefix(" ") for text, prompt in zip(expected, PROMPTS, strict=True)]


def test_ids_end_with_the_token_that_makes_one_whole(stories260k):
    tokenizer, strings = stories260k.preprocessor.tokenizer, " there was"
    result = write(stories260k, PROMPTS[0], stop_strings=strings)
    ids = result["token_ids"][0][result["padding_mask"][0]].tolist()
    assert strings in tokenizer.detokenize(ids[1:]) and strings not in tokenizer.detokenize(ids[1:-1])
    assert np.isfinite(result["log_probs"][0][result["padding_mask"][0]][5:]).all()
    assert write(stories260k, {"token_ids": [ids[:5]]}, stop_strings=strings)["token_ids"][0].tolist() == ids


def test_the_work_ends_soon(stories260k, monkeypatch):
    sizes = count_tokens(monkeypatch)
    write(stories260k, PROMPTS, stop_strings=["e", "a"])
    assert sum(sizes) <= 1 + 2 * 16


def test_a_row_that_ends_leaves_the_others_alone(stories260k):
    alone = [write(stories260k, prompt, stop_strings="her")["texts"] for prompt in PROMPTS]
    assert write(stories260k, PROMPTS, stop_strings="her")["texts"] == alone
    assert len(set(map(len, alone))) == 3


def test_each_sequence_has_its_own(stories260k):
    arguments = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3, "num_return_sequences": 3}
    whole = stories260k.generate(PROMPTS[0], **arguments)
    expected = [cut(text, PROMPTS[0], [" the"]) for text in whole]
    assert stories260k.generate(PROMPTS[0], stop_strings=" the", **arguments) == expected != whole


def test_text_that_a_decoder_holds_back(stories260k):
    """A character of several tokens is text once nothing can change it; one that the prompt begins is the prompt's."""
    tokenizer = stories260k.preprocessor.tokenizer
    prompt, new = tokenizer("Lily ŋ")[:-1], tokenizer("Lily ŋɔ")[-3:]
    assert len(prompt) > 2 and tokenizer.detokenize([*prompt, *new]) == "Lily ŋɔ"
    for strings, is_found, num_dropped in ((["ɔ"], True, 1), (["ŋ"], False, 0), (["y"], False, 0)):
        text = StopText(strings, [np.array(prompt)], tokenizer)
        assert text.add(0, new) == 3 and text.is_found == [False]
        text.finish(0)
        assert text.is_found == [is_found] and text.num_dropped == [num_dropped]
    text = StopText(["ɔ"], [np.array(prompt)], tokenizer)
    following = tokenizer(" boy")
    assert text.add(0, [*new, *following]) == 4 and text.is_found == [True]
    assert text.num_dropped == [len(tokenizer.detokenize([*prompt, *new, following[0]])) - len("Lily ŋ")]


def test_a_token_that_goes_on_behind_one():
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    vocabulary = {token: i for i, token in enumerate(["a", "bcÅ", *special])}  # the last byte begins a character
    tokenizer = kllama.Llama3Tokenizer(vocabulary=vocabulary, merges=[])
    text = StopText(["b"], [np.array([0])], tokenizer)
    assert text.add(0, [0, 1, 1]) == 2 and text.is_found == [True]
    assert tokenizer.detokenize([0, 0, 1]) == "aabc\ufffd" and text.num_dropped == [3]


@pytest.mark.parametrize("loop", ["plain", "protocol"])
def test_other_loops(stories260k, loop, monkeypatch):
    arguments = {"max_length": 40, "stop_token_ids": None, "stop_strings": [" there was"]}
    expected = stories260k.generate(PROMPTS[0], temperature=0, **arguments)
    if loop == "plain":
        call_with_cache = stories260k.call_with_cache
        monkeypatch.setattr(
            stories260k, "call_with_cache", lambda *args, **keywords: call_with_cache(*args, **keywords)
        )
        assert stories260k.generate(PROMPTS[0], temperature=0, **arguments) == expected
    else:
        stories260k.sampler = keras_hub.samplers.BeamSampler(num_beams=1)
        result = stories260k.generate(PROMPTS[0], return_dict=True, **arguments)
        stories260k.sampler = "auto"
        assert result["texts"] == expected and result["finish_reasons"] == ["stop"]
        assert np.isnan(result["log_probs"]).all()


def test_somebody_elses_tokenizer():
    class Own(keras_hub.tokenizers.Tokenizer):
        end_token_id = None

        def vocabulary_size(self):
            return 5

    sizes = {"num_query_heads": 2, "hidden_dim": 8, "intermediate_dim": 8, "num_key_value_heads": 1}
    preprocessor = kllama.LlamaCausalLMPreprocessor(letters())
    model = kllama.LlamaCausalLM(kllama.LlamaBackbone(5, 1, **sizes), preprocessor)
    preprocessor.tokenizer = Own(dtype="string" if keras.config.backend() == "tensorflow" else "int32")
    with pytest.raises(TypeError, match="stop_strings .* need a LlamaTokenizer"):
        model.generate({"token_ids": [[1]]}, max_new_tokens=2, stop_strings="a")
