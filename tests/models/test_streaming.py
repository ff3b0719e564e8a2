"""`stream` and `chat`: the same text as `generate`, in pieces, and what a conversation does not read again."""

import gc

import keras
import numpy as np
import pytest

import kllama
from kllama.generation import engine
from kllama.generation.programs import Programs
from kllama.models import streaming

GREEDY = {"temperature": 0}
STORY = "Once upon a time"
TALK = [{"role": "user", "content": "hello you"}]


def build(**arguments) -> kllama.LlamaCausalLM:
    """Build a model with random weights that can chat."""
    keras.utils.set_random_seed(3)
    words = ["user assistant system hello you"] * 2
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = kllama.LlamaTokenizer.train(words, 280, special_tokens=special, chat_template="chatml")
    sizes = {"num_layers": 1, "num_query_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}
    defaults = {"vocabulary_size": 280, "num_key_value_heads": 1, "initializer_range": 0.5, **sizes}
    backbone = kllama.LlamaBackbone(**{**defaults, **arguments})
    return kllama.LlamaCausalLM(backbone, kllama.LlamaCausalLMPreprocessor(tokenizer, sequence_length=64))


@pytest.fixture(scope="module")
def built():
    """A model that no test changes, so that its programs are compiled once."""
    return build()


@pytest.fixture
def talker(built):
    """The same, with no conversation kept."""
    built.kept_conversations = 2
    built.forget_conversations()
    return built


@pytest.fixture
def reads(monkeypatch):
    """List what the engine reads of prompts: the program, and how many positions it runs over."""
    seen, get = [], Programs.get

    def spy(self, settings, function, **options):
        program = get(self, settings, function, **options)

        def run(*arrays):
            if settings[0] is engine.prefill:
                seen.append(("prefill", arrays[0].shape[1]))
            if settings[0] is engine.extend:
                seen.append(("extend", arrays[1].shape[1]))
            return program(*arrays)

        return run

    monkeypatch.setattr(Programs, "get", spy)
    return seen


class TestStream:
    @pytest.mark.parametrize(
        "options",
        [
            GREEDY,
            {"temperature": 1.0, "seed": 3},
            {"stop_strings": ["girl", "Tim"], **GREEDY},
            {"stop_strings": " there", **GREEDY},
            {"stop_strings": ["time"], **GREEDY},
            {"prompt_lookup_num_tokens": 3, **GREEDY},
        ],
    )
    def test_pieces_are_the_text_of_generate(self, stories260k, options):
        for strip_prompt in (True, False):
            pieces = list(stories260k.stream(STORY, max_new_tokens=60, strip_prompt=strip_prompt, **options))
            text = stories260k.generate(STORY, max_new_tokens=60, strip_prompt=strip_prompt, **options)
            assert "".join(pieces) == text
            assert all(pieces) and (len(pieces) > 5 or "stop_strings" in options)

    def test_a_text_that_may_become_a_stop_string_is_held_back(self, stories260k):
        pieces = list(stories260k.stream(STORY, max_new_tokens=60, stop_strings=" there was a little cat", **GREEDY))
        assert pieces[0] == "," and pieces[1].startswith(" there was a little ")

    def test_token_ids(self, stories260k):
        prompt = {"token_ids": np.array([[1, 403, 407, 261]])}
        expected = stories260k.generate(prompt, max_new_tokens=60, strip_prompt=True, **GREEDY)["token_ids"][0]
        assert list(stories260k.stream(prompt, max_new_tokens=60, **GREEDY)) == expected.tolist()
        whole = [1, 403, 407, 261, *expected]
        assert list(stories260k.stream(prompt, max_new_tokens=60, strip_prompt=False, **GREEDY)) == whole
        stopped = {"stop_strings": ["girl", "Tim"], "max_new_tokens": 60, **GREEDY}
        expected = stories260k.generate(prompt, strip_prompt=True, **stopped)["token_ids"][0]
        assert len(expected) < 60 and list(stories260k.stream(prompt, **stopped)) == expected.tolist()

    @pytest.mark.parametrize("steps", [1, 5, 64])
    def test_the_text_does_not_depend_on_the_chunks(self, stories260k, monkeypatch, steps):
        monkeypatch.setattr(streaming, "next_chunk", lambda num_steps, seconds: steps)
        options = {"max_new_tokens": 60, "temperature": 0.9, "seed": 5}
        assert "".join(stories260k.stream(STORY, **options)) == stories260k.generate(
            STORY, strip_prompt=True, **options
        )

    def test_characters_are_whole(self, talker):
        pieces = list(talker.stream("hello", max_new_tokens=40, temperature=1.0, seed=1))
        text = talker.generate("hello", max_new_tokens=40, temperature=1.0, seed=1, strip_prompt=True)
        assert "".join(pieces) == text and "\ufffd" in text  # bytes at random

    @pytest.mark.parametrize(
        ("inputs", "options", "error", "words"),
        [
            (["a", "b"], {}, ValueError, "list of 2 prompts.*generate"),
            (["a"], {}, ValueError, "generate"),
            ({"token_ids": [[1, 2], [3, 4]]}, {}, ValueError, "generate"),
            ([TALK, TALK], {}, ValueError, "generate"),
            ([], {}, ValueError, "list of 0 prompts"),
            (None, {}, TypeError, "inputs"),
            ("a", {"max_new_tokens": 0}, ValueError, "max_new_tokens"),
            ("a", {"temperature": -1}, ValueError, "temperature"),
            ("a", {"num_return_sequences": 2}, TypeError, "num_return_sequences.*max_new_tokens"),
            ("a", {"strip_prompt": 1}, TypeError, "strip_prompt"),
            ("a", {"bogus": 1}, TypeError, "bogus"),
        ],
    )
    def test_wrong_arguments_fail_at_the_call(self, talker, reads, inputs, options, error, words):
        with pytest.raises(error, match=words):
            talker.stream(inputs, **options)
        assert not reads

    def test_leaving_the_loop_stops_the_work(self, talker, monkeypatch):
        closed, paced = [], streaming._paced

        def watched(decoding):
            try:
                yield from paced(decoding)
            finally:
                closed.append(decoding.state.num_new)

        monkeypatch.setattr(streaming, "_paced", watched)
        for _ in talker.stream("hello", max_new_tokens=40, **GREEDY):
            break
        gc.collect()
        pieces = talker.stream("hello", max_new_tokens=40, **GREEDY)
        next(pieces)
        pieces.close()
        never_begun = talker.stream("hello", max_new_tokens=40, **GREEDY)
        del never_begun
        assert len(closed) == 2 and all(int(count) < 20 for count in closed)
        assert talker.generate("hello", max_new_tokens=5, **GREEDY)

    def test_a_loop_of_somebody_else_gives_one_piece(self, talker):
        class Own(kllama.LlamaCausalLM):
            def generate_step(self, inputs, stop_token_ids=None):
                return {"token_ids": inputs["token_ids"] + 70, "padding_mask": inputs["padding_mask"] * 0 + 1}

        model = Own(talker.backbone, talker.preprocessor)
        model.compile(run_eagerly=True)
        (text,) = model.stream("hello", max_new_tokens=2)
        assert text == model.generate("hello", max_new_tokens=2, strip_prompt=True) != ""

    def test_a_prompt_without_room(self, talker):
        assert list(talker.stream({"token_ids": np.ones((1, 5), "int32")}, max_length=5)) == []


@pytest.mark.parametrize(
    ("num_steps", "seconds", "following"),
    [(1, 3.0, 1), (1, 0.001, 2), (2, 0.002, 4), (40, 0.01, 64), (10, 0.1, 5), (64, 0.0, 64), (8, 0.05, 8)],
)
def test_next_chunk(num_steps, seconds, following):
    assert streaming.next_chunk(num_steps, seconds) == following


class TestConversation:
    def test_a_turn_reads_what_is_new(self, talker, reads):
        messages = []
        for _ in range(6):
            messages.append({"role": "user", "content": "hello you"})
            answer = talker.chat(messages, max_new_tokens=4, **GREEDY)
            messages.append({"role": "assistant", "content": answer})
        assert [name for name, _ in reads] == ["prefill", *["extend"] * 5]
        assert max(width for _, width in reads) == 32
        talker.kept_conversations = 0
        for turn in range(0, 12, 2):
            assert talker.chat(messages[: turn + 1], max_new_tokens=4, **GREEDY) == messages[turn + 1]["content"]
        assert reads[-1] == ("prefill", 128)
        assert talker.generate(messages[:-1], max_new_tokens=4, **GREEDY) == answer

    def test_what_is_kept(self, talker):
        talker.chat(TALK, max_new_tokens=4, stop_token_ids=None, **GREEDY)
        (prompt,) = talker.preprocessor.prompt_rows(TALK)
        (kept,) = talker._prefix_caches._kept
        assert kept.token_ids[: len(prompt)].tolist() == prompt
        assert len(kept.token_ids) == len(prompt) + 3  # the last one was given, and not read yet

    def test_an_edited_message(self, talker, reads):
        first = [{"role": "system", "content": "hello hello hello hello"}]
        talker.chat([*first, *TALK], max_new_tokens=4, **GREEDY)
        edited = [*first, {"role": "user", "content": "you hello"}]
        answer = talker.chat(edited, max_new_tokens=4, **GREEDY)
        assert [name for name, _ in reads] == ["prefill", "extend"]
        assert talker.generate(edited, max_new_tokens=4, **GREEDY) == answer

    def test_caches_grow(self, talker, reads):
        turn = {"role": "user", "content": "hello" * 30}
        messages = []
        for _ in range(4):
            messages += [turn, {"role": "assistant", "content": "you"}]
            answer = talker.chat([*messages, turn], max_new_tokens=1, **GREEDY)
        assert [name for name, _ in reads] == ["prefill", *["extend"] * 3]
        assert answer == talker.generate([*messages, turn], max_new_tokens=1, **GREEDY)

    def test_drafts(self, talker, reads):
        options = {"max_new_tokens": 6, "prompt_lookup_num_tokens": 2, **GREEDY}
        messages = [*TALK, {"role": "assistant", "content": "you you"}, *TALK]
        talker.chat(messages[:1], **options)
        assert talker.chat(messages, **options) == talker.generate(messages, max_new_tokens=6, **GREEDY)
        assert [name for name, _ in reads] == ["prefill", "extend", "prefill"]

    def test_a_stream_left_early(self, talker, reads):
        expected = talker.chat(TALK, max_new_tokens=8, **GREEDY)
        for _ in talker.stream(TALK, max_new_tokens=8, **GREEDY):
            break
        assert talker.chat(TALK, max_new_tokens=8, **GREEDY) == expected
        assert [name for name, _ in reads] == ["prefill", "extend", "extend"]

    def test_no_cache_in_two_hands(self, talker, reads):
        expected = "".join(talker.stream(TALK, max_new_tokens=8, **GREEDY))
        streams = [talker.stream(TALK, max_new_tokens=8, **GREEDY) for _ in range(2)]
        texts = ["", ""]
        for pieces in zip(*streams, strict=True):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        assert texts == [expected, expected]
        assert [name for name, _ in reads] == ["prefill", "extend", "prefill"]

    def test_a_failure_leaves_nothing(self, talker, monkeypatch, reads):
        def fail(decoding):
            yield next(iter(decoding)).tokens[0, 0].item()
            raise ArithmeticError("NaN")

        talker.chat(TALK, max_new_tokens=4, **GREEDY)
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
            patch.setattr(streaming, "_paced", fail)
            talker.chat(TALK, max_new_tokens=4, **GREEDY)
        talker.chat(TALK, max_new_tokens=4, **GREEDY)
        assert [name for name, _ in reads] == ["prefill", "extend", "prefill"]

    def test_switched_off(self, talker, reads):
        talker.chat(TALK, max_new_tokens=4, **GREEDY)
        talker.kept_conversations = 0
        for _ in range(2):
            talker.chat(TALK, max_new_tokens=4, **GREEDY)
        assert [name for name, _ in reads] == ["prefill"] * 3

    def test_frequencies_that_depend_on_the_length(self, reads):
        model = build(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_sequence_length=64)
        for _ in range(2):
            model.chat(TALK, max_new_tokens=1, **GREEDY)
        assert [name for name, _ in reads] == ["prefill", "prefill"]

    def test_no_change_of_the_weights_goes_unseen(self, reads, tmp_path):
        model = build()
        build(initializer_range=0.6).save_weights(tmp_path / "other.weights.h5")
        kernel = model.backbone.transformer_layers[0].self_attention.key.kernel
        model.compile("sgd", loss="sparse_categorical_crossentropy", weighted_metrics=[])
        model.preprocessor.sequence_length = 40
        changes = {
            "assign": lambda: kernel.assign(-keras.ops.convert_to_numpy(kernel)),
            "set_weights": lambda: model.set_weights([2 * weight for weight in model.get_weights()]),
            "load_weights": lambda: model.load_weights(tmp_path / "other.weights.h5"),
            "fit": lambda: model.fit(["hello you"], verbose=0),
            "enable_lora": lambda: model.backbone.enable_lora(2),
            "quantize": lambda: model.quantize("int8"),
        }
        model.chat(TALK, max_new_tokens=1, **GREEDY)
        for name, change in changes.items():
            model.chat(TALK, max_new_tokens=1, **GREEDY)
            assert reads[-1][0] == "extend", name
            change()
            answer = model.chat(TALK, max_new_tokens=1, **GREEDY)
            assert reads[-1][0] == "prefill", name
            model.forget_conversations()
            assert model.chat(TALK, max_new_tokens=1, **GREEDY) == answer, name

    @pytest.mark.parametrize(
        ("messages", "error"),
        [
            ("hello", TypeError),
            ([], TypeError),
            (["hello"], ValueError),
            ({"token_ids": [[1]]}, ValueError),
            ([TALK], ValueError),
        ],
    )
    def test_wrong_messages(self, talker, messages, error):
        with pytest.raises(error, match="messages"):
            talker.chat(messages)

    @pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
    def test_wrong_kept_conversations(self, talker, count, error):
        with pytest.raises(error, match="kept_conversations"):
            talker.kept_conversations = count
