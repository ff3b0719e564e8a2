"""Lists of merges against the rule they stand for: the best pair, the leftmost of equals."""

import itertools
import random

import pytest
from tokenizers import models

from kllama.errors import UnsupportedError
from kllama.text.formats.merges import check_work, scored_merges

pytestmark = pytest.mark.backend_independent


def merged(text: str, scores: dict[str, float]) -> list[str]:
    parts = list(text)
    while True:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        found = [(-scores[piece], place) for place, piece in enumerate(joined) if piece in scores]
        if not found:
            return parts
        place = min(found)[1]
        parts[place : place + 2] = [joined[place]]


def check(texts: list[str], scores: dict[str, float]) -> None:
    vocabulary = {piece: place for place, piece in enumerate(scores)}
    model = models.BPE(vocab=vocabulary, merges=scored_merges(scores, "m"))
    received = [[token.value for token in model.tokenize(text)] if text else [] for text in texts]
    assert received == [merged(text, scores) for text in texts]


# Runs of spaces in Llama 2 (no length missing), Mistral (15), and others.
@pytest.mark.parametrize("lengths", [range(2, 17), [*range(2, 15), 16], [2, 4, 8, 16], [2, 3, 5], [3], [2, 3, 4, 32]])
def test_runs_of_equal_score(lengths):
    scores = {"_": 0.0, "x": -1.0, **{"_" * length: -9.0 for length in lengths}, "_x": -3.0, "__x": -5.0}
    check(["x" + "_" * length + "x" for length in range(150)], scores)


def test_runs_of_any_lengths():
    for lengths in itertools.chain.from_iterable(itertools.combinations(range(2, 9), size) for size in range(2, 5)):
        scores = {"_": 0.0, **{"_" * length: -9.0 for length in lengths}}
        check(["_" * length for length in range(8, 30, 3)], scores)


@pytest.mark.parametrize("seed", range(60))
def test_random_pieces(seed):
    """Pieces made of pieces, so that there are several ways to form most of them."""
    rng = random.Random(seed)
    pieces = ["a", "b", "c"][: 2 + seed % 2]
    while len(pieces) < 25:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if len(piece) <= 8 and piece not in pieces:
            pieces.append(piece)
    characters = [piece for piece in pieces if len(piece) == 1]
    rng.shuffle(pieces)
    scores = {piece: -float(place) for place, piece in enumerate(pieces)}
    texts = ["".join(rng.choices(characters, k=rng.randint(0, 30))) for _ in range(60)] + ["a" * 30, "ab" * 15]
    check(texts, scores)


def test_equals_that_overlap():
    with pytest.raises(UnsupportedError, match='m: score of "ab" and "bc" = -1.0; expected different scores'):
        scored_merges({"a": 0.0, "b": 0.0, "c": 0.0, "ab": -1.0, "bc": -1.0}, "m")
    assert scored_merges({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0, "ab": -1.0, "cd": -1.0}, "m")
    assert scored_merges({"a": 0.0, "b": 0.0, "ab": -1.0, "bc": -1.0}, "m")  # nothing forms "bc"


def test_pieces_that_are_too_long():
    pieces = {"a" * 10_000 + str(place): place for place in range(2)}
    with pytest.raises(UnsupportedError, match="m: length of the longest piece = 10001"):
        check_work(pieces, "m")
    with pytest.raises(UnsupportedError, match="m: length of the longest piece = 10001"):
        scored_merges(dict.fromkeys(pieces, 0.0), "m")
