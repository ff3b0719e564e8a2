"""Formats told apart by content, the recorded ids of every format, and files with damage of any kind."""

import json
import os
import shutil

import pytest

from kllama.errors import CheckpointError, MissingFileError
from kllama.text.formats import recognise, tiktoken_ranks
from kllama.text.formats.llama2c import open_llama2c
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import byte_characters
from kllama.text.formats.sentencepiece_model import open_sentencepiece
from kllama.text.formats.tiktoken_ranks import open_tiktoken
from kllama.text.formats.tokenizer_json import open_json

pytestmark = pytest.mark.backend_independent

TOK512 = "models/stories260K/llama2c/tok512.bin"
STORIES = ("models/stories260K/tokenizer.json", "models/stories260K/tokenizer.model", TOK512)
# File: columns of mixed_text.json and llama_cpp.json, of special_tokens.json as text and parsed.
GOLDENS = {
    "tokenizers/llama2/tokenizer.model": ("llama2", "llama_spm", "llama2_plain", "llama2_parsed"),
    "tokenizers/mistral_v3/tokenizer.model": ("mistral_v3", None, None, None),
    "models/stories260K/tokenizer.model": ("stories260k", None, None, None),
    "tokenizers/llama3/tokenizer.model": ("llama3", "llama_bpe", "llama3_plain", "llama3_parsed"),
    "tokenizers/gpt2/vocab.json": ("gpt2", "gpt_2", None, "gpt2_parsed"),
    "tokenizers/gpt2/tokenizer.json": ("gpt2", "gpt_2", None, "gpt2_parsed"),
    "tokenizers/llama3_2/tokenizer.json": ("llama3", "llama_bpe", "llama3_plain", "llama3_parsed"),
    "models/stories15M/tokenizer.json": ("llama2", "llama_spm", "llama2_plain", "llama2_parsed"),
    TOK512: ("stories260k", None, None, None),
}


class TestGoldens:
    @pytest.mark.parametrize("source", GOLDENS)
    def test_recorded_ids(self, assets, golden, source):
        encoder = open_vocabulary(assets / source).encoder
        mixed, llama_cpp, plain, parsed = GOLDENS[source]
        # llama2.c has no U+2581 and keeps it as bytes.
        skipped = "\u2581" if source == TOK512 else "\0\0"
        for name, column, as_text in (
            ("mixed_text", mixed, True),
            ("llama_cpp", llama_cpp, True),
            ("special_tokens", plain, True),
            ("special_tokens", parsed, False),
        ):
            if column is None:
                continue
            rows = zip(golden[name]["texts"], golden[name][column], strict=True)
            rows = [(text, ids) for text, ids in rows if skipped not in text]
            encoder.encode_special_tokens = as_text
            with_start = column == "llama2_parsed"  # recorded so
            received = encoder.encode_batch_fast([text for text, _ in rows], add_special_tokens=with_start)
            assert [encoding.ids for encoding in received] == [ids for _, ids in rows]

    @pytest.mark.parametrize("source", ["tokenizers/llama2/tokenizer.model", "models/stories15M/tokenizer.json"])
    def test_recorded_text(self, assets, golden, source):
        encoder, recorded = open_vocabulary(assets / source).encoder, golden["mixed_text"]
        assert encoder.decode_batch(recorded["llama2"], skip_special_tokens=False) == recorded["llama2_decode"]


class TestRecognise:
    @pytest.mark.parametrize("source", ["tokenizers/gpt2/vocab.json", *STORIES])
    def test_names_do_not_count(self, assets, source, tmp_path):
        name = "vocab.json" if source.endswith("vocab.json") else "whatever"
        shutil.copyfile(assets / source, tmp_path / name)
        if name == "vocab.json":
            shutil.copyfile(assets / "tokenizers/gpt2/merges.txt", tmp_path / "merges.txt")
        expected = open_vocabulary(assets / source)
        received = open_vocabulary(tmp_path / name)
        assert received[1:] == expected[1:] and received.encoder.to_str() == expected.encoder.to_str()

    def test_order_in_a_directory(self, assets, tmp_path):
        sources = [
            "models/stories15M/tokenizer.json",
            "tokenizers/mistral_v3/tokenizer.model",
            "tokenizers/gpt2/vocab.json",
            TOK512,
        ]
        names = ["tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer.bin"]
        for source, name in zip(sources, names, strict=True):
            shutil.copyfile(assets / source, tmp_path / name)
        shutil.copyfile(assets / "tokenizers/gpt2/merges.txt", tmp_path / "merges.txt")
        for name, size in zip(names, (32_000, 32_768, 50_257, 512), strict=True):
            assert open_vocabulary(str(tmp_path)).encoder.get_vocab_size() == size
            (tmp_path / name).unlink()
        with pytest.raises(MissingFileError, match="expected tokenizer.json, tokenizer.model, vocab.json"):
            open_vocabulary(tmp_path)
        shutil.copyfile(assets / "models/stories260K/tokenizer.model", tmp_path / "vocabulary.spm")
        assert open_vocabulary(tmp_path).encoder.get_vocab_size() == 512

    def test_no_file(self, tmp_path):
        for path in (tmp_path / "nothing", "x" * 10_000, "a\0b", ""):
            with pytest.raises(MissingFileError):
                open_vocabulary(path)
        for source in (3, None, ["tokenizer.json"]):
            with pytest.raises(TypeError, match="tokenizer = "):
                open_vocabulary(source)

    @pytest.mark.parametrize("source", [STORIES[1], TOK512])
    def test_bytes(self, assets, source):
        expected, received = open_vocabulary(assets / source), open_vocabulary((assets / source).read_bytes())
        assert received[1:] == expected[1:] and received.encoder.to_str() == expected.encoder.to_str()

    def test_bytes_of_no_model(self, monkeypatch):
        for data in (b"", b"tokenizer.json", b'{"model": {}}', b"#version: 0.2\na b\n"):
            with pytest.raises(CheckpointError, match="tokenizer: first bytes = .*Pass the path"):
                open_vocabulary(data)
        monkeypatch.setattr(recognise, "MAX_BYTES", 9)
        with pytest.raises(CheckpointError, match="tokenizer: size = 10 bytes; expected at most 9"):
            open_vocabulary(b"\n" * 10)

    def test_no_regular_file(self, tmp_path):
        os.mkfifo(tmp_path / "tokenizer.model")
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_vocabulary(tmp_path)

    def test_too_large(self, tmp_path):
        with open(tmp_path / "tokenizer.model", "wb") as file:
            file.truncate(64 * 2**20 + 1)
        with pytest.raises(CheckpointError, match="size = 67108865 bytes"):
            open_vocabulary(tmp_path)

    def test_unknown_content(self, tmp_path):
        path = tmp_path / "tokenizer.model"
        for content in (b"\x80\x02ctorch", b"GGUF\3\0\0\0", b"one\n", b"\n\0\0", b"{", b"[1]", b"\xff" * 99):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=str(path)):
                open_vocabulary(path)
        path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="empty"):
            open_vocabulary(path)


@pytest.fixture(scope="module")
def small(assets):
    """Small files of every format, with their readers."""
    lines = (assets / "tokenizers/llama3/tokenizer.model").read_bytes().splitlines(keepends=True)
    bpe = {character: byte for byte, character in byte_characters().items()} | {"ab": 256, "abc": 257}
    story = assets / "models/stories260K"
    return {
        "tokenizer.json": (story / "tokenizer.json").read_bytes(),
        "spm": (story / "tokenizer.model").read_bytes(),
        "tiktoken": b"".join(lines[:300]),
        "llama2c": (assets / TOK512).read_bytes(),
        "vocab.json": json.dumps(bpe).encode(),
        "merges.txt": b"#version: 0.2\na b\nab c\n",
    }


READERS = {
    "tokenizer.json": lambda data: open_json(data.decode("utf-8", "replace")),
    "spm": lambda data: open_sentencepiece(data, "m"),
    "tiktoken": lambda data: open_tiktoken(data, "m"),
    "llama2c": lambda data: open_llama2c(data, "m"),
}
FORMATS = [*READERS, "vocab.json", "merges.txt"]


def survives(open_damaged) -> bool:
    """Open a file that may be sound after all; any other error than that of a wrong file fails the test."""
    try:
        open_damaged().encoder.encode("a b <s>")
    except CheckpointError:
        return False
    return True


class TestDamage:
    @pytest.fixture(autouse=True)
    def few_ranks(self, monkeypatch):
        monkeypatch.setattr(tiktoken_ranks, "NUM_RANKS", 300)

    def check(self, small, damaged, tmp_path, kind, seeds):
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes(small[name])
        path = tmp_path / (kind if kind in small and "." in kind else "file")
        survivors = 0
        for seed in seeds:
            path.write_bytes(damaged(small[kind], seed))
            survivors += survives(lambda: open_vocabulary(path))
            if kind in READERS:
                survives(lambda seed=seed: READERS[kind](damaged(small[kind], seed)))
        assert survivors < 0.9 * len(seeds)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_random_damage(self, small, damaged, tmp_path, kind):
        self.check(small, damaged, tmp_path, kind, range(100))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", FORMATS)
    def test_random_damage_at_length(self, small, damaged, tmp_path, kind):
        self.check(small, damaged, tmp_path, kind, range(100, 5000))

    @pytest.mark.parametrize("kind", READERS)
    def test_the_files_of_other_formats(self, small, kind):
        assert survives(lambda: READERS[kind](small[kind]))
        for other in FORMATS:
            assert other == kind or not survives(lambda other=other: READERS[kind](small[other]))

    @pytest.mark.parametrize("kind", READERS)
    def test_random_bytes(self, kind):
        for size in (0, 1, 3, 4, 12, 100, 10_000):
            assert not survives(lambda size=size: READERS[kind](os.urandom(size)))
