"""The reader of llama2.c's tokenizer.bin, against a plain copy of the rules of its encoder."""

import json
import struct

import pytest

from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.llama2c import open_llama2c

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def data(assets) -> bytes:
    return (assets / "models/stories260K/llama2c/tok512.bin").read_bytes()


def read(data: bytes) -> list[tuple[str, float]]:
    entries, at = [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        entries.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    return entries


def write(entries, longest=7) -> bytes:
    stored = [(text.encode(), score) for text, score in entries]
    return struct.pack("<I", longest) + b"".join(struct.pack("<fi", s, len(t)) + t for t, s in stored)


def encode(entries, text: str) -> list[int]:
    """Encode as llama2.c does: a space, bytes for unknown characters, then the best pair, the leftmost of equals."""
    ids = {piece: token_id for token_id, (piece, _) in enumerate(entries)}
    tokens = [ids[" "]] if text else []
    for character in text:
        tokens += [ids[character]] if character in ids else [3 + byte for byte in character.encode()]
    while True:
        pairs = enumerate(zip(tokens, tokens[1:], strict=False))
        joined = [(ids.get(entries[a][0] + entries[b][0]), place) for place, (a, b) in pairs]
        found = [(-entries[token_id][1], place, token_id) for token_id, place in joined if token_id is not None]
        if not found:
            return tokens
        _, place, token_id = min(found)
        tokens[place : place + 2] = [token_id]


class TestEncoder:
    def test_random_texts(self, data, random_texts):
        encoder, entries = open_llama2c(data, "m").encoder, read(data)
        encoder.encode_special_tokens = True
        texts = [*random_texts(1, ["<s>", "</s>", "<unk>", "\n<s>\n", "<0x41>", "\u2581"]), "", " ", "\u2581"]
        received = encoder.encode_batch_fast(texts, add_special_tokens=False)
        wrong = [text for text, ids in zip(texts, received, strict=True) if ids.ids != encode(entries, text)]
        assert wrong == []
        # One space is the encoder's own; a byte that is a space counts as one too.
        assert encoder.decode_batch([ids.ids for ids in received], skip_special_tokens=False) == texts

    def test_published_runs(self, data, assets):
        opened = open_llama2c(data, "m")
        path = assets / "models/stories260K/expected/llama2c_runs.json"
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"].values():
            ids = opened.encoder.encode(run["prompt"]).ids
            assert run["token_ids"][: len(ids)] == ids and ids[0] == 1
            assert opened.encoder.decode(run["token_ids"]) == run["text"]

    def test_names(self, data):
        opened = open_llama2c(data, "m")
        assert opened[1:] == ("<s>", "</s>", True)
        assert [opened.encoder.id_to_token(token_id) for token_id in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
        assert opened.encoder.encode("a</s>", add_special_tokens=False).ids == [261, 2]
        assert opened.encoder.decode([1, 261], skip_special_tokens=True) == "a"


def change(token_id, piece=None, score=None):
    def edit(entries):
        old = entries[token_id]
        entries[token_id] = (old[0] if piece is None else piece, old[1] if score is None else score)

    return edit


WRONG = {
    "token 0 = ": change(0, "<pad>"),
    "token 1 = ": change(1, "<s>"),
    "token 2 = ": change(2, "</s>"),
    "token 70 = ": change(70, "<0xGG>"),
    "token 258 = null": lambda entries: entries.__delitem__(slice(258, None)),
    "no token is one space": lambda entries: entries.remove(next(entry for entry in entries if entry[0] == " ")),
    "token 300: length = 8": change(300, "abcdefgh"),
    "token 300: length = 0": change(300, ""),
    'token 300: "he"': change(300, "he"),
    "token 300: .*, nan": change(300, score=float("nan")),
    "token 300: .*, inf": change(300, score=float("inf")),
    'token 300 = "<s>"': change(300, "<s>"),
}


class TestWrong:
    @pytest.mark.parametrize("fault", WRONG)
    def test_semantic(self, data, fault):
        entries = read(data)
        WRONG[fault](entries)
        with pytest.raises(CheckpointError, match=f"m: {fault}"):
            open_llama2c(write(entries), "m")

    def test_unedited(self, data):
        assert write(read(data)) == data

    def test_scores_that_settle_nothing(self, data):
        entries = read(data)
        for token_id, piece in ((259, "th"), (260, "he")):
            entries[token_id] = (piece, -7.5)
        with pytest.raises(UnsupportedError, match="different scores"):
            open_llama2c(write(entries), "m")

    def test_a_name_that_text_could_spell(self, data):
        entries = read(data)
        entries[300], entries[301] = ("<s>\n", -300.0), ("\n", -301.0)
        with pytest.raises(UnsupportedError, match="expected one that no text spells"):
            open_llama2c(write(entries), "m")

    @pytest.mark.parametrize("length", [-1, -(2**31), 2**31 - 1, 100])
    def test_lengths_beyond_the_file(self, data, length):
        with pytest.raises(CheckpointError, match="token 0: length"):
            open_llama2c(data[:8] + struct.pack("<i", length) + data[12:], "m")

    def test_cut_anywhere(self, data):
        ends, at = set(), 4
        for piece, _ in read(data):
            at += 8 + len(piece.encode())
            ends.add(at)
        for length in range(0, len(data), 3):
            if length not in ends:  # the format does not say how many tokens there are
                with pytest.raises(CheckpointError):
                    open_llama2c(data[:length], "m")
