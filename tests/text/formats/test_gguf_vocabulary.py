"""Vocabularies of GGUF files: the ids of the tokenizers that the files were converted from."""

import json

import pytest

from kllama.errors import CheckpointError, KllamaError, UnsupportedError
from kllama.text.formats.gguf_pre_tokenizers import PRE_TOKENIZERS
from kllama.text.formats.patterns import refusal
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import byte_characters, flat
from kllama.text.tokenizer import LlamaTokenizer
from tests.checkpoints.damage import refuses
from tests.checkpoints.gguf_files import SlowReader, gguf, typed
from tests.checkpoints.mutation import mutate

pytestmark = pytest.mark.backend_independent

SMOLLM2 = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
INT32 = 5


@pytest.fixture
def write(tmp_path):
    """Return a function that writes `tokenizer.ggml.*` keys to a file without weights."""

    def write_keys(keys, name="vocabulary.gguf"):
        entries = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
        if isinstance(keys.get("token_type"), list):
            entries["tokenizer.ggml.token_type"] = typed(keys["token_type"], INT32)
        path = tmp_path / name
        path.write_bytes(gguf(entries))
        return path

    return write_keys


def byte_level(pre="gpt-2", added=(), merges=("a b", "ab c"), **keys):
    """Return the keys of a byte-level vocabulary; `added` are tokens and their kinds, at the end."""
    tokens = [*byte_characters().values(), *(merge.replace(" ", "") for merge in merges)]
    kinds = [NORMAL] * len(tokens) + [kind for _, kind in added]
    tokens = [*tokens, *(token for token, _ in added)]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": list(merges), **keys}


def sentencepiece(added=(), **keys):
    """Return the keys of a vocabulary by scores."""
    pieces = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    pieces |= {piece: NORMAL for piece in ("▁", "a", "b", "c", "ab", "▁ab", "abc")} | dict(added)
    scores = [-float(place) for place in range(len(pieces))]
    return {"model": "llama", "tokens": list(pieces), "scores": scores, "token_type": list(pieces.values()), **keys}


def encode(path, text, parse_special=False, **options):
    encoder = open_vocabulary(path, **options).encoder
    encoder.encode_special_tokens = not parse_special
    return encoder.encode(text, add_special_tokens=False).tokens


# === Real files ===


@pytest.mark.parametrize(
    "name, reference, golden_name",
    [
        (SMOLLM2, "models/smollm2-135m-instruct/tokenizer.json", "smollm2"),
        ("gguf/stories260K-q8_0.gguf", "models/stories260K/tokenizer.json", "stories260k"),
    ],
)
def test_ids_are_those_of_the_original(assets, golden, random_texts, name, reference, golden_name):
    received, expected = (open_vocabulary(assets / file).encoder for file in (name, reference))
    assert received.get_vocab() == expected.get_vocab()
    mixed = golden["mixed_text"]
    encodings = received.encode_batch(mixed["texts"], add_special_tokens=False)
    assert [encoding.ids for encoding in encodings] == mixed[golden_name]

    special = [token.content for token in expected.get_added_tokens_decoder().values()]
    texts = random_texts(1, special, 1000) + mixed["texts"]
    for parse_special in (False, True):
        for encoder in (received, expected):
            encoder.encode_special_tokens = not parse_special
        ids = [encoding.ids for encoding in expected.encode_batch(texts, add_special_tokens=False)]
        assert [encoding.ids for encoding in received.encode_batch(texts, add_special_tokens=False)] == ids
    assert [received.decode(row, skip_special_tokens=False) for row in ids] == [
        expected.decode(row, skip_special_tokens=False) for row in ids
    ]


def test_the_template_is_that_of_the_original(assets):
    settings = json.loads((assets / "models/smollm2-135m-instruct/tokenizer_config.json").read_text())
    keys = SlowReader((assets / SMOLLM2).read_bytes()).metadata
    assert keys["tokenizer.chat_template"] == settings["chat_template"]


def test_llama2_without_a_flag_begins_with_its_start_token(assets, golden):
    opened = open_vocabulary(assets / "gguf/llama-2-tiny-random.gguf")
    assert (opened.start_token, opened.end_token, opened.adds_start_token) == ("<s>", "</s>", True)
    mixed = golden["mixed_text"]
    encodings = opened.encoder.encode_batch(mixed["texts"], add_special_tokens=False)
    assert [encoding.ids for encoding in encodings] == mixed["llama2"]


def converted(assets, name, pre):
    """Return the keys that a converter makes of a tokenizer.json."""
    content = json.loads((assets / name).read_text(encoding="utf-8"))
    added = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    ids = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    tokens = sorted(ids, key=ids.get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    kinds = [added.get(token, NORMAL) for token in tokens]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}


@pytest.mark.parametrize(
    "name, pre",
    [
        ("tokenizers/gpt2/tokenizer.json", "gpt-2"),
        pytest.param("tokenizers/llama3_2/tokenizer.json", "llama-bpe", marks=pytest.mark.slow),
    ],
)
def test_a_converted_tokenizer_gives_its_ids(assets, golden, random_texts, write, name, pre):
    path = write(converted(assets, name, pre) | {"bos_token_id": 0})
    received, expected = (open_vocabulary(file).encoder for file in (path, assets / name))
    texts = random_texts(2, ["<|endoftext|>", "<|eot_id|>"], 1000) + golden["mixed_text"]["texts"]
    for parse_special in (False, True):
        for encoder in (received, expected):
            encoder.encode_special_tokens = not parse_special
        ids = [encoding.ids for encoding in expected.encode_batch(texts, add_special_tokens=False)]
        assert [encoding.ids for encoding in received.encode_batch(texts, add_special_tokens=False)] == ids


# === Byte-level vocabularies ===

SAMPLE = "I'M don't 1234  é日本!\n\n x_y"
LLAMA3 = ["I", "'M", " don", "'t", " ", "123", "4", " ", " é日本", "!\n\n", " x", "_y"]
GPT2 = ["I", "'", "M", " don", "'t", " 1234", " ", " é日本", "!", "\n\n", " x", "_", "y"]
QWEN2 = ["I", "'M", " don", "'t", " ", "1", "2", "3", "4", " ", " é日本", "!\n\n", " x", "_y"]
DIGITS = ["I", "'", "M", " don", "'t", " ", "1", "2", "3", "4", " ", " é日本", "!", "\n\n", " x", "_", "y"]
SPLITS = {
    "gpt-2": GPT2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": QWEN2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "deepseek-coder": "I|'|M| don|'|t| |1|2|3|4| | é|日本|!|\n|\n| x|_|y".split("|"),
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_how_texts_are_split(write, pre):
    encoder = open_vocabulary(write(byte_level(pre, [("<s>", CONTROL)], bos_token_id=258))).encoder
    pieces = [SAMPLE[start:end] for _, (start, end) in encoder.pre_tokenizer.pre_tokenize_str(SAMPLE)]
    assert pieces == SPLITS[pre]


def test_the_patterns_cannot_run_without_end():
    for known in PRE_TOKENIZERS.values():
        for part in flat(known.pre_tokenizer, "pretokenizers"):
            assert part["type"] != "Split" or refusal(part["pattern"]["Regex"]) is None


def test_normalization(write):
    tokens = encode(write(byte_level("qwen2")), "e\u0301")
    assert tokens == ["Ã", "©"]
    assert encode(write(byte_level("gpt-2")), "e\u0301") == ["e", "Ì", "ģ"]


@pytest.mark.parametrize(
    "pre, flag, adds",
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False), ("gpt-2", True, True)],
)
def test_the_start_token(write, pre, flag, adds):
    keys = byte_level(pre, [("<s>", CONTROL), ("</s>", CONTROL)], bos_token_id=258, eos_token_id=259)
    opened = open_vocabulary(write({**keys, "add_bos_token": flag}))
    assert (opened.start_token, opened.end_token, opened.adds_start_token) == ("<s>", "</s>", adds)
    assert opened.encoder.encode("a").tokens == (["<s>", "a"] if adds else ["a"])


def test_control_tokens_are_text_unless_asked_for_and_user_defined_ones_never(write):
    path = write(byte_level(added=[("<c>", CONTROL), ("<u>", USER_DEFINED), ("[PAD]", UNUSED)]))
    assert encode(path, "abc<c>abc<u>[PAD]") == ["abc", "<", "c", ">", "abc", "<u>", *"[PAD]"]
    assert encode(path, "abc<c>abc<u>", parse_special=True) == ["abc", "<c>", "abc", "<u>"]


def test_a_control_token_at_the_end_is_not_found_by_its_spelling(write):
    keys = byte_level("llama-bpe", [("<s>", CONTROL), ("word", CONTROL)], bos_token_id=258)
    assert encode(write(keys), "word") == list("word")
    assert encode(write(keys), "word", parse_special=True) == ["word"]


def test_the_tokenizer_of_a_file(write, tmp_path):
    path = write(byte_level("smollm", [("<s>", CONTROL), ("</s>", CONTROL)], bos_token_id=258, eos_token_id=259))
    tokenizer = LlamaTokenizer(path)
    assert (tokenizer.start_token, tokenizer.end_token) == ("<s>", "</s>")
    ids = tokenizer.tokenize("abc 日本 1</s>").tolist()
    assert tokenizer.detokenize(ids) == "abc 日本 1</s>"
    tokenizer.save_assets(tmp_path)
    assert LlamaTokenizer(tmp_path / "tokenizer.json").tokenize("abc 日本 1</s>").tolist() == ids


# === Vocabularies by scores ===


def test_marks_of_word_starts(write):
    keys = sentencepiece([("<u>", USER_DEFINED), ("[PAD]", UNUSED)])
    assert encode(write(keys), "ab abc<u>c") == ["▁ab", "▁ab", "c", "<u>", "▁", "c"]
    assert encode(write({**keys, "add_space_prefix": False}), "ab abc<u>c") == ["ab", "▁ab", "c", "<u>", "c"]
    assert encode(write(keys), "ab abc<u>c", add_prefix_space=False) == ["ab", "▁ab", "c", "<u>", "c"]
    assert encode(write(keys), "ab abc<u>c", legacy=False) == ["▁ab", "▁ab", "c", "<u>", "c"]
    assert encode(write(keys), "[PAD]") == ["▁", *(f"<0x{byte:02X}>" for byte in b"[PAD]")]
    for options in ({}, {"add_space_prefix": False}):
        encoder = open_vocabulary(write({**keys, **options})).encoder
        for text in ("ab é", " ab"):
            assert encoder.decode(encoder.encode(text).ids) == text


def test_start_and_end_of_a_file_that_names_none(write):
    opened = open_vocabulary(write(sentencepiece()))
    assert (opened.start_token, opened.end_token, opened.adds_start_token) == ("<s>", "</s>", True)
    opened = open_vocabulary(write(sentencepiece(add_bos_token=False)))
    assert (opened.start_token, opened.adds_start_token) == ("<s>", False)


def test_a_vocabulary_without_bytes(write):
    keys = sentencepiece()
    for name in ("tokens", "scores", "token_type"):
        keys[name] = keys[name][:3] + keys[name][259:]
    assert encode(write(keys), "abcéé") == ["▁ab", "c", "<unk>"]


# === What is refused ===


def without(key, keys):
    return {**keys, key: None}


FAULTS = {
    "no tokens": (without("tokens", byte_level()), CheckpointError, "no tokenizer.ggml.tokens"),
    "no model": (without("model", byte_level()), CheckpointError, "no tokenizer.ggml.model"),
    "another model": ({**byte_level(), "model": "bert"}, UnsupportedError, 'model = "bert"'),
    "no pre": (byte_level(pre=None), UnsupportedError, "pre = null; expected one of gpt-2, llama-bpe"),
    "the default pre": (byte_level("default"), UnsupportedError, 'pre = "default"'),
    "another pre": (byte_level("viking"), UnsupportedError, 'pre = "viking"'),
    "a pre with scores": (sentencepiece(pre="llama-bpe"), UnsupportedError, 'pre = "llama-bpe"'),
    "no kinds": (without("token_type", byte_level()), CheckpointError, "no tokenizer.ggml.token_type"),
    "no merges": (without("merges", byte_level()), CheckpointError, "no tokenizer.ggml.merges"),
    "no scores": (without("scores", sentencepiece()), CheckpointError, "no tokenizer.ggml.scores"),
    "too few kinds": ({**byte_level(), "token_type": [1] * 257}, CheckpointError, "token_type = 257; expected 258"),
    "too few scores": ({**sentencepiece(), "scores": [0.0] * 3}, CheckpointError, "scores = 3; expected 266"),
    "a token twice": (byte_level(added=[("a", NORMAL)]), CheckpointError, 'token "a"'),
    "an empty token": (byte_level(added=[("", NORMAL)]), CheckpointError, 'token ""'),
    "kind 0": (byte_level(added=[("xyz", 0)]), CheckpointError, '"xyz" = 0; expected 1 to 6'),
    "kind 7": (byte_level(added=[("xyz", 7)]), CheckpointError, '"xyz" = 7; expected 1 to 6'),
    "a merge of one": (byte_level(merges=["a b"]) | {"merges": ["ab"]}, CheckpointError, 'merge 0 = "ab"'),
    "a merge of three": (byte_level() | {"merges": ["a b c"]}, CheckpointError, 'merge 0 = "a b c"'),
    "a merge of no token": (byte_level() | {"merges": ["a b", "b a"]}, CheckpointError, 'merge 1 = "b a"'),
    "a merge twice": (byte_level() | {"merges": ["a b", "a b"]}, CheckpointError, "expected another than 0"),
    "a start beyond the end": (byte_level(bos_token_id=258), CheckpointError, "bos_token_id"),
    "no start": (byte_level("llama-bpe"), CheckpointError, "expected tokenizer.ggml.bos_token_id"),
    "a prefix": (byte_level(add_space_prefix=True), UnsupportedError, "add_space_prefix = true"),
    "a flag of 1": (byte_level(add_bos_token=1), CheckpointError, "expected true or false"),
    "numbers for a name": (sentencepiece(pre=typed([1, 2])), UnsupportedError, "tokenizer.ggml.pre = "),
    "spaces taken away": (sentencepiece(remove_extra_whitespaces=True), UnsupportedError, "remove_extra_whitespaces"),
    "a table": (sentencepiece(precompiled_charsmap=typed([1, 2], 0)), UnsupportedError, "precompiled_charsmap"),
    "half of the bytes": (
        {name: value[:100] + value[259:] if name != "model" else value for name, value in sentencepiece().items()},
        CheckpointError,
        "expected 256 or none",
    ),
    "a score that is no number": (
        {**sentencepiece(), "scores": [float("nan")] * 266},
        CheckpointError,
        "expected a finite number",
    ),
    "scores that do not settle": ({**sentencepiece(), "scores": [0.0] * 266}, UnsupportedError, "different scores"),
    "an unknown character": (sentencepiece([("xy", NORMAL)]), UnsupportedError, "expected characters that are tokens"),
    "an unused piece that is formed": (sentencepiece([("ca", UNUSED)]), UnsupportedError, 'unused token "ca"'),
    "a control character": (sentencepiece([("x", CONTROL)]), UnsupportedError, '"x" = 3'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_vocabulary_is_refused(write, fault):
    keys, error, message = FAULTS[fault]
    with refuses(error, "vocabulary.gguf", message):
        open_vocabulary(write(keys))


def check_mutants(write, keys, count):
    """Open mutants of a vocabulary; return how many were accepted, each with the tokens of the file as its ids."""
    path = write(keys)
    sound, accepted = path.read_bytes(), 0
    for seed in range(count):
        data = mutate(sound, seed)
        path.write_bytes(data)
        try:
            encoder = open_vocabulary(path).encoder
        except KllamaError as error:
            assert "\n" not in str(error), seed
            continue
        accepted += 1
        encoder.encode("abc é <s> \0")
        tokens = SlowReader(data).metadata["tokenizer.ggml.tokens"]
        assert sorted(encoder.get_vocab().items(), key=lambda item: item[1]) == [
            (token, token_id) for token_id, token in enumerate(tokens)
        ], seed
    return accepted


@pytest.mark.parametrize("count", [75, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "keys",
    [
        sentencepiece([("<u>", USER_DEFINED)]),
        byte_level(added=[("<s>", CONTROL), *((f"<user defined {place}>", USER_DEFINED) for place in range(100))]),
    ],
)
def test_mutants_are_refused_or_keep_the_ids_of_the_file(write, keys, count):
    assert check_mutants(write, keys, count) < count
