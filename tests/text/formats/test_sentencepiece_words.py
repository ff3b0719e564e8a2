"""SentencePiece models of words, and tables of normalization, against SentencePiece itself."""

import io
import random

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.normalization_table import read_table, table_normalizers
from kllama.text.formats.sentencepiece_model import open_sentencepiece

pytestmark = pytest.mark.backend_independent

LINES = ["the quick brown fox", "the earth is round", "ii the (fox) isn't 12 quick"]
WORDS = ["the", "fox", "is", "round", "ii", "(fox)", "isn't", "12"]
SPELLINGS = ["<s>", "</s>", "<unk>", *WORDS]
FLAGS = {
    "the default table": {},
    "no table": {"normalization_rule_name": "identity"},
    "no table, extra spaces": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "a table that folds case": {"normalization_rule_name": "nfkc_cf"},
}
UNSUPPORTED = {
    "byte_fallback": {"byte_fallback": True, "vocab_size": 270},
    "allow_whitespace_only_pieces": {"allow_whitespace_only_pieces": True},
    "add_dummy_prefix": {"add_dummy_prefix": False},
    "remove_extra_whitespaces": {"remove_extra_whitespaces": False},
    "a user-defined piece": {"user_defined_symbols": ["<sep>"]},
    "treat_whitespace_as_suffix": {"treat_whitespace_as_suffix": True},
}


def trained(lines=LINES, **flags) -> bytes:
    written = io.BytesIO()
    defaults = {"model_type": "word", "vocab_size": 14, "unk_id": 0, "bos_id": 1, "eos_id": 2, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, **{**defaults, **flags}
    )
    return written.getvalue()


def edited(edit, **flags) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(trained(**flags))
    edit(proto)
    return proto.SerializeToString()


def table_of(data: bytes) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    return proto.normalizer_spec.precompiled_charsmap


def texts_around(words: list[str], rare: list[str], count: int) -> list[str]:
    """Texts of words, spaces, marks and rare characters, of which many touch a word."""
    rng = random.Random(4)

    def part():
        return rng.choice([rng.choice(words), f"{rng.choice(words)} ", " ", "\u2581", rng.choice(rare), "x", "\0"])

    return ["".join(part() for _ in range(rng.randint(0, 7))) for _ in range(count)]


class TestWords:
    @pytest.mark.parametrize("flags", FLAGS)
    def test_against_sentencepiece(self, random_texts, flags):
        data = trained(**FLAGS[flags])
        table = table_of(data)
        rare = list(read_table(table, "m")) if table else ["\t", "\u3000", "\u0301", "ｔ", "ﬁ", "\r\n"]
        texts = random_texts(5, SPELLINGS, 1000) + texts_around(WORDS, rare, 8000)
        texts += [f"the{key}fox" for key in rare if len(key) == 1]
        encoder = tokenizers.Tokenizer.from_str(open_sentencepiece(data, "m").encoder.to_str())
        encoder.encode_special_tokens = True
        reference = sentencepiece.SentencePieceProcessor(model_proto=data)
        expected = reference.encode(texts)
        received = [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)]
        assert [row for row in zip(texts, received, expected, strict=True) if row[1] != row[2]] == []
        assert sum(max(ids, default=0) > 2 for ids in expected) > 2000
        known = [[token_id for token_id in ids if token_id] for ids in expected]
        assert encoder.decode_batch(known, skip_special_tokens=False) == reference.decode(known)

    def test_neighbours_that_are_unknown_are_one_token(self):
        opened = open_sentencepiece(trained(), "m")
        assert opened[1:] == ("<s>", "</s>", True)
        ids = opened.encoder.encode("the zz yy fox xx", add_special_tokens=False).ids
        assert [opened.encoder.id_to_token(i) for i in ids] == ["\u2581the", "<unk>", "\u2581fox", "<unk>"]

    @pytest.mark.parametrize("reason", UNSUPPORTED)
    def test_unsupported(self, reason):
        with pytest.raises(UnsupportedError, match=f"m: {reason} .*cannot be run"):
            open_sentencepiece(trained(**UNSUPPORTED[reason]), "m")

    @pytest.mark.parametrize("index, piece", [(3, "the"), (3, "\u2581a\u2581b"), (3, "\u2581a b"), (1, "\u2581the ")])
    def test_pieces_that_are_no_words(self, index, piece):
        with pytest.raises(UnsupportedError, match="m: piece .*; expected words"):
            open_sentencepiece(edited(lambda proto: setattr(proto.pieces[index], "piece", piece)), "m")

    def test_more_words_than_a_pattern_holds(self):
        lines = [f"word{i:05d}" for i in range(3000)]
        data = trained(lines, vocab_size=3003, normalization_rule_name="identity")
        with pytest.raises(UnsupportedError, match="m: the pattern of 3000 words has"):
            open_sentencepiece(data, "m")


@pytest.fixture(scope="module")
def table() -> bytes:
    return table_of(trained())


class TestTable:
    def test_every_entry_is_what_sentencepiece_makes_of_it(self, table):
        entries = read_table(table, "m")
        assert entries["ﬁ"] == "fi" and entries["\t"] == " " and entries["e\u0301"] == "é" and len(entries) > 200_000
        normalizer = sentencepiece.SentencePieceNormalizer(
            rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
        )
        keys = [key for index, key in enumerate(entries) if len(key) == 1 or index % 20 == 0]
        assert normalizer.normalize(keys) == [entries[key] for key in keys]

    @pytest.mark.parametrize(
        "entries, characters, fault",
        [
            ({"a": "b"}, {"a"}, 'replaces "a", which is part'),
            ({" ": "_"}, {"a"}, 'replaces " ", which is part'),
            ({"\ue000": "x"}, {"a"}, "which is part"),
            ({}, {"\ue000"}, "which is part"),
            ({"e\u0301": "é"}, {"é"}, "as a whole"),
            ({"xy": "a"}, {"a"}, "as a whole"),
            ({"xy": " x"}, {"a"}, "as a whole"),
            ({"ab": "x"}, {"a", "b"}, "as a whole"),
        ],
    )
    def test_a_table_that_single_characters_cannot_stand_for(self, entries, characters, fault):
        with pytest.raises(UnsupportedError, match=f"m: precompiled_charsmap .*{fault}"):
            table_normalizers(entries, characters, "m")

    def test_a_word_with_another_character_is_unknown_whatever_it_becomes(self):
        entries = {"e\u0301": "é", "é": "E", "ﬁ": "fi", "ﬂ": "fl", "¨": " \u0308", "\t": " ", "\x01": ""}
        replaced = {
            part["content"]: part["pattern"]["Regex"] for part in table_normalizers(entries, {"f", "i", "e"}, "m")
        }
        assert replaced == {
            "": r"[\x{1}-\x{1}]",
            " ": r"[\x{9}-\x{9}]",
            " \ue000": r"[\x{a8}-\x{a8}]",
            "fi": r"[\x{fb01}-\x{fb01}]",
        }

    def test_damage(self, table, damaged):
        survivors = 0
        for seed in range(24):
            try:
                read_table(damaged(table, seed), "m")
                survivors += 1
            except CheckpointError as error:
                assert str(error).startswith("m: precompiled_charsmap")
        assert survivors < 24

    @pytest.mark.parametrize("data", [b"", b"\0\0\0\0", b"\xff\xff\xff\xff" * 9, b"\3\0\0\0abcd", b"\4\0\0\0abc"])
    def test_cut(self, data):
        with pytest.raises(CheckpointError, match="is cut"):
            read_table(data, "m")

    @pytest.mark.parametrize("num_ways", [1, 16])
    def test_a_trie_that_runs_in_circles(self, num_ways):
        # The children of the root are at offset 0, and so are the children of each of them: byte XOR byte.
        units = [byte << 10 | byte if byte <= num_ways else 0 for byte in range(256)]
        blob = b"".join(unit.to_bytes(4, "little") for unit in units)
        with pytest.raises(CheckpointError, match="in circles"):
            read_table(len(blob).to_bytes(4, "little") + blob + b"\0", "m")

    @pytest.mark.parametrize("length, is_read", [(0, True), (256, True), (257, False), (10**6, False)])
    def test_the_length_of_a_text(self, length, is_read):
        blob = one_level([0], b"a" * length + b"\0")
        if is_read:
            assert read_table(blob, "m") == {"\1": "a" * length}
        else:
            with pytest.raises(CheckpointError, match="m: precompiled_charsmap .* of more than 256 bytes"):
                read_table(blob, "m")

    def test_texts_that_lie_in_each_other(self):
        texts = b"a" * 200 + b"\0"
        assert read_table(one_level([0, 0, 0], texts), "m") == dict.fromkeys(["\1", "\2", "\3"], "a" * 200)
        with pytest.raises(CheckpointError, match="m: precompiled_charsmap .*into a text"):
            read_table(one_level([0, 1], texts), "m")


def one_level(starts: list[int], texts: bytes) -> bytes:
    """Make a table that replaces the characters 1, 2, ... by the texts at these places."""
    units = [0] * (256 * (len(starts) + 1))
    for byte, start in enumerate(starts, 1):
        children = 256 * byte  # of which there is one, with label 0: the leaf
        units[byte] = (children ^ byte) << 10 | 1 << 8 | byte
        units[children] = 1 << 31 | start
    blob = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(blob).to_bytes(4, "little") + blob + texts
