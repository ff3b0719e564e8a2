"""Stop strings in texts that come in pieces, beside a search through the whole text."""

import random

import pytest

from kllama.text.stop_strings import StopStrings

pytestmark = pytest.mark.backend_independent


def scan(strings, pieces):
    """Give the text that comes out, whether a stop string was found, and the pieces that came out."""
    scanner = StopStrings(strings).scanner()
    given = [scanner.add(piece) for piece in pieces]
    return "".join(given) + scanner.finish(), scanner.is_found, given


def search(strings, text):
    """The same of the whole text: it is cut before the string that ends first, and before the longest of these."""
    ends = [(text.find(string) + len(string), -len(string)) for string in strings if string in text]
    if not ends:
        return text, False
    end, length = min(ends)
    return text[: end + length], True


@pytest.mark.parametrize(
    ("strings", "pieces", "given"),
    [
        (["END"], ["a", "E", "N", "D", "b"], ["a", "", "", "", ""]),
        (["END"], ["aE", "Nb", "c"], ["a", "ENb", "c"]),
        (["END"], ["xENEND y"], ["xEN"]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["bc", "abcd"], ["abcd"], ["a"]),  # "bc" is whole first, however the text comes
        (["bc", "abcd"], ["a", "b", "c", "d"], ["", "", "a", ""]),
        (["abc", "c"], ["ab", "c"], ["", ""]),
        (["é\n"], ["caf", "é", "\n"], ["caf", "", ""]),
    ],
    ids=str,
)
def test_pieces_come_out_as_soon_as_they_are_final(strings, pieces, given):
    assert scan(strings, pieces)[2] == given


def test_what_was_held_back_comes_at_the_end():
    assert scan(["END", "Nx"], ["aEN"]) == ("aEN", False, ["a"])


@pytest.mark.parametrize(
    ("count", "seed"), [(2_000, 1), pytest.param(200_000, 2, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_any_text_in_any_pieces(count, seed):
    draw = random.Random(seed)
    num_found = 0
    for _ in range(count):
        strings = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 4))]
        text = "".join(draw.choices("abc", (5, 5, 2), k=draw.randint(0, 30)))
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 8)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, is_found, given = scan(strings, pieces)
        assert (out, is_found) == search(strings, text), (strings, pieces)
        num_found += is_found
    assert count / 10 < num_found < count
