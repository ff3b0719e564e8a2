"""The reader of Llama 3's tiktoken file against tiktoken, and against the tokenizer.json of the same tokens."""

import base64

import pytest
import tiktoken

from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats import tiktoken_ranks
from kllama.text.formats.patterns import LLAMA3
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import byte_characters
from kllama.text.formats.tiktoken_ranks import open_tiktoken

pytestmark = pytest.mark.backend_independent

SPELLINGS = ["<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_4|>", "<|python_tag|>", "<|eot_id", "<s>"]


@pytest.fixture(scope="module")
def data(assets) -> bytes:
    return (assets / "tokenizers/llama3/tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def ranks(data) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}


@pytest.fixture(scope="module")
def opened(data):
    return open_tiktoken(data, "tokenizer.model")


def ids_of(encoder, texts, as_text, **options):
    encoder.encode_special_tokens = as_text
    return [encoding.ids for encoding in encoder.encode_batch_fast(texts, **options)]


class TestLlama3:
    def test_against_tiktoken(self, opened, ranks, random_texts):
        reference = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
        texts = random_texts(1, SPELLINGS)
        received = ids_of(opened.encoder, texts, True, add_special_tokens=False)
        expected = [reference.encode(text, disallowed_special=()) for text in texts]
        assert [text for text, a, b in zip(texts, received, expected, strict=True) if a != b] == []
        assert opened.encoder.decode_batch(received, skip_special_tokens=False) == texts

    def test_against_the_json(self, opened, assets, random_texts):
        reference, *rest = open_vocabulary(assets / "tokenizers/llama3_2")
        assert rest == ["<|begin_of_text|>", None, True]
        texts = random_texts(2, SPELLINGS)
        for as_text in (True, False):
            assert ids_of(opened.encoder, texts, as_text) == ids_of(reference, texts, as_text)
        assert opened.encoder.get_vocab() == reference.get_vocab()
        assert opened.encoder.get_added_tokens_decoder() == reference.get_added_tokens_decoder()

    def test_every_token(self, opened, ranks):
        whole, parts = {}, {}
        for token, rank in ranks.items():
            try:
                whole[rank] = token.decode("utf-8")
            except UnicodeDecodeError:
                parts[rank] = token
        assert len(whole) == 126_648
        received = ids_of(opened.encoder, list(whole.values()), True, add_special_tokens=False)
        assert received == [[rank] for rank in whole]
        assert opened.encoder.decode_batch(received, skip_special_tokens=False) == list(whole.values())
        of_character = {character: byte for byte, character in byte_characters().items()}
        for rank, token in parts.items():
            assert bytes(map(of_character.__getitem__, opened.encoder.id_to_token(rank))) == token
            assert opened.encoder.decode([rank]) == token.decode("utf-8", "replace")

    def test_named_tokens(self, opened):
        assert opened[1:] == ("<|begin_of_text|>", "<|end_of_text|>", True)
        assert opened.encoder.encode("a").ids == [128_000, 64] and opened.encoder.get_vocab_size() == 128_256

    def test_another_number_of_ranks(self, data):
        lines = data.splitlines(keepends=True)
        with pytest.raises(UnsupportedError, match="number of ranks = 127999; expected 128000"):
            open_tiktoken(b"".join(lines[:-1]), "tokenizer.model")


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


SMALL = [line(bytes([byte]), byte) for byte in range(256)] + [
    line(b"ab", 256),
    line(b"abc", 257),
    line(b"\xf0\x9f", 258),
]
WRONG = {
    r"line 3: \"AA=== 2\"": (2, b"AA=== 2\n"),
    r"line 3: \"A\"": (2, b"A 2\n"),
    r"line 257: rank = 300": (256, line(b"ab", 300)),
    r"line 257: rank = 255": (256, line(b"ab", 255)),
    r"line 257: rank = -1": (256, line(b"ab", -1)),
    r"line 258: the token of line 257": (257, line(b"ab", 257)),
    r"line 258: the token of line 98": (257, line(b"a", 257)),
    r"line 258: \"YWI=\"": (257, b"YWI=\n"),
    r"line 258: \"\"": (257, b"\n"),
    r"line 258: .*two": (257, b"YWI= two\n"),
    "no token for 1 bytes, such as 0x61": (97, line(b"zz", 97)),
}


class TestSmall:
    @pytest.fixture(autouse=True)
    def number(self, monkeypatch):
        monkeypatch.setattr(tiktoken_ranks, "NUM_RANKS", len(SMALL))

    def test_sound(self):
        for data in (b"".join(SMALL), b"".join(SMALL)[:-1], b"".join(SMALL).replace(b"\n", b"\r\n")):
            encoder = open_tiktoken(data, "m").encoder
            assert ids_of(encoder, ["abc <|eot_id|>"], False, add_special_tokens=False) == [[257, 32, 259 + 9]]

    @pytest.mark.parametrize("fault", WRONG)
    def test_wrong(self, fault):
        number, wrong = WRONG[fault]
        with pytest.raises(CheckpointError, match=f"m: {fault}"):
            open_tiktoken(b"".join([*SMALL[:number], wrong, *SMALL[number + 1 :]]), "m")

    def test_cut_anywhere(self):
        data = b"".join(SMALL)
        for length in range(0, len(data) - 1, 7):
            with pytest.raises(CheckpointError):
                open_tiktoken(data[:length], "m")
