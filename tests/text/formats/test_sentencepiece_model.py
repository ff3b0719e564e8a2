"""The reader of SentencePiece models against SentencePiece itself."""

import io

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.sentencepiece_model import open_sentencepiece

pytestmark = pytest.mark.backend_independent

REAL = ("tokenizers/llama2", "tokenizers/mistral_v3", "models/stories260K")
SPELLINGS = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<0x41>", "[REFERENCE_DOC_1]", "[REFERENCE_DOC_19]", "[X]"]
SPELLINGS += ["<sep>", "[XY]", "<c>", "ing", "the", "[control_8]"]
# Runs of spaces, which all have one score in Llama 2, and control pieces that stand alone between other pieces.
EDGES = ["", "\u2581", " \u2581", *(" " * n for n in range(1, 200)), *(" " * n + "a" for n in range(1, 200))]
EDGES += [first + second for first in ("[REFERENCE_DOC_1]", "<sep>") for second in SPELLINGS]
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6


def ids_of(encoder, texts, as_text=True):
    encoder.encode_special_tokens = as_text
    return [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)]


def compare(data: bytes, texts) -> tokenizers.Tokenizer:
    """Check ids and text against SentencePiece."""
    encoder, reference = open_sentencepiece(data, "m").encoder, sentencepiece.SentencePieceProcessor(model_proto=data)
    expected = reference.encode(texts)
    assert [text for text, a, b in zip(texts, ids_of(encoder, texts), expected, strict=True) if a != b] == []
    known = [[token_id for token_id in row if token_id != reference.unk_id()] for row in expected]
    decoded = encoder.decode_batch(known, skip_special_tokens=False)
    assert [(a, b) for a, b in zip(decoded, reference.decode(known), strict=True) if a != b] == []
    return encoder


def trained(assets, **flags) -> bytes:
    lines = (assets / "text" / "tinyshakespeare.txt").read_text()[:60_000].split("\n")
    written = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 600, "normalization_rule_name": "identity"}
    defaults |= {"remove_extra_whitespaces": False, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "日本語 é ñ 0123456789"]), model_writer=written, **{**defaults, **flags}
    )
    return written.getvalue()


class TestReal:
    @pytest.mark.parametrize("folder", REAL)
    def test_random_texts(self, assets, random_texts, folder):
        compare((assets / folder / "tokenizer.model").read_bytes(), random_texts(1, SPELLINGS) + EDGES)

    def test_named_tokens(self, assets):
        opened = open_sentencepiece((assets / "tokenizers/mistral_v3/tokenizer.model").read_bytes(), "m")
        assert opened[1:] == ("<s>", "</s>", True)
        assert opened.encoder.encode("a").ids == [1, *opened.encoder.encode("a", add_special_tokens=False).ids]
        special = [token.content for token in opened.encoder.get_added_tokens_decoder().values() if token.special]
        assert len(special) == 751 and "[INST]" in special and "[REFERENCE_DOC_1]" not in special

    def test_controls_are_parsed_on_demand(self, assets):
        encoder = open_sentencepiece((assets / "tokenizers/mistral_v3/tokenizer.model").read_bytes(), "m").encoder
        assert ids_of(encoder, ["[INST]"], as_text=False) == [[3]] and 3 not in ids_of(encoder, ["[INST]"])[0]

    @pytest.mark.parametrize("folder", REAL)
    def test_the_split_at_words_changes_nothing(self, assets, random_texts, folder):
        encoder = open_sentencepiece((assets / folder / "tokenizer.model").read_bytes(), "m").encoder
        texts = [text for text in random_texts(2, SPELLINGS, 2000) if "[REFERENCE" not in text]
        split = ids_of(encoder, texts)
        at_words = tokenizers.Tokenizer.from_str(encoder.to_str())
        at_words.model.ignore_merges = False
        at_words.pre_tokenizer = pre_tokenizers.Sequence([])
        assert "MergedWithNext" in encoder.to_str() and ids_of(at_words, texts) == split


FLAGS = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "no dummy prefix": {"add_dummy_prefix": False, "byte_fallback": True},
    "no extra spaces": {"remove_extra_whitespaces": True},
    "no extra spaces, no dummy prefix": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "words of spaces": {"allow_whitespace_only_pieces": True, "byte_fallback": True},
    "pieces over spaces": {"split_by_whitespace": False, "byte_fallback": True},
    "user-defined": {"user_defined_symbols": ["<sep>", "[X", "[XY]", "ing", "\n", "日本", "a"], "byte_fallback": True},
    "user-defined, unknown": {"user_defined_symbols": ["<sep>", "[X]", "[XY]"], "add_dummy_prefix": False},
    "user-defined, control": {"user_defined_symbols": ["<sep>"], "control_symbols": ["<c>", "the"]},
    "no start, no end": {"bos_id": -1, "eos_id": -1, "pad_id": 1},
}
UNSUPPORTED = {
    "precompiled_charsmap": {"normalization_rule_name": "nmt_nfkc"},
    "treat_whitespace_as_suffix": {"treat_whitespace_as_suffix": True},
    "unigram": {"model_type": "unigram"},
    "char": {"model_type": "char", "vocab_size": 70},
    "without spaces": {"user_defined_symbols": ["a b"]},
    "beside a user-defined piece": {"user_defined_symbols": ["<sep>"], "control_symbols": ["<>"]},  # all of it unknown
}


class TestTrained:
    @pytest.mark.parametrize("flags", FLAGS)
    def test_random_texts(self, assets, random_texts, flags):
        encoder = compare(trained(assets, **FLAGS[flags]), random_texts(3, SPELLINGS, 2000) + EDGES)
        assert ("MergedWithNext" in encoder.to_str()) == (flags != "pieces over spaces")

    def test_no_start_token(self, assets):
        assert open_sentencepiece(trained(assets, **FLAGS["no start, no end"]), "m")[1:] == (None, None, None)

    @pytest.mark.parametrize("reason", UNSUPPORTED)
    def test_unsupported(self, assets, reason):
        with pytest.raises(UnsupportedError, match=f"m: .*{reason}"):
            open_sentencepiece(trained(assets, **UNSUPPORTED[reason]), "m")


def edited(assets, edit) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((assets / "models/stories260K/tokenizer.model").read_bytes())
    edit(proto)
    return proto.SerializeToString()


def set_piece(index, **fields):
    def edit(proto):
        for name, value in fields.items():
            setattr(proto.pieces[index], name, value)

    return edit


def overlap(proto):
    proto.pieces[259].score = proto.pieces[260].score = -7.5
    proto.pieces[259].piece, proto.pieces[260].piece = "th", "he"


WRONG = {
    "no pieces": lambda proto: proto.ClearField("pieces"),
    "no trainer_spec": lambda proto: proto.ClearField("trainer_spec"),
    "no normalizer_spec": lambda proto: proto.ClearField("normalizer_spec"),
    'piece 300 = ""': set_piece(300, piece=""),
    r'piece 300 = "he"': set_piece(300, piece="he"),
    "unknown pieces = 0": set_piece(0, type=CONTROL),
    "unknown pieces = 2": set_piece(1, type=2),
    "byte pieces = 255": lambda proto: proto.pieces.pop(70),
    "byte pieces = 256": set_piece(70, piece="<0xGG>"),
    "byte pieces = 256, ": lambda proto: setattr(proto.trainer_spec, "byte_fallback", False),
    "= nan": set_piece(300, score=float("nan")),
    "= -inf": set_piece(300, score=float("-inf")),
    "unused": set_piece(300, type=UNUSED),
    "characters that are pieces": set_piece(300, piece="\u6587x"),
    "escape_whitespaces": lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False),
    "different scores": overlap,
}


class TestWrong:
    @pytest.mark.parametrize("fault", WRONG)
    def test_semantic(self, assets, fault):
        with pytest.raises(CheckpointError, match=f"m: .*{fault}"):
            open_sentencepiece(edited(assets, WRONG[fault]), "m")

    def test_bytes_that_are_no_text(self, assets):
        data = edited(assets, set_piece(300, piece="abcdefghi")).replace(b"abcdefghi", b"abc\xffefghi")
        with pytest.raises(CheckpointError, match="piece 300 = .*; expected UTF-8"):
            open_sentencepiece(data, "m")

    def test_unedited(self, assets):
        assert open_sentencepiece(edited(assets, lambda proto: None), "m").encoder.get_vocab_size() == 512

    @pytest.mark.parametrize("folder", REAL)
    def test_cut_anywhere(self, assets, folder):
        data = (assets / folder / "tokenizer.model").read_bytes()
        for length in [*range(0, 40), *range(40, len(data), len(data) // 50), len(data) - 1]:
            with pytest.raises(CheckpointError):
                open_sentencepiece(data[:length], "m")
