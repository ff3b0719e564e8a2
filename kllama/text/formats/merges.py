"""Turn pieces with scores or ranks into the ordered merges of byte-pair encoding.

SentencePiece, tiktoken and llama2.c all join the neighbours that form the best piece, the leftmost of equals, while the
Rust library applies a list of pairs in its order. The list made here gives the same result; where no list can,
the file is refused. The readers of these formats call it.
"""

from collections.abc import Mapping

from kllama.checkpoints.files.reader import shown
from kllama.errors import UnsupportedError

# The sum of the squared lengths of all pieces, which bounds the work. That of Llama 3 is 8 million.
MAX_WORK = 2**27


def check_work(pieces: Mapping[str, object], source: object) -> None:
    """Refuse pieces so long that the search for their merges would take minutes.

    Args:
        pieces: what merges are to be made of.
        source: the file, for the message.

    Raises:
        UnsupportedError: naming the length of the longest.
    """
    if sum(len(piece) ** 2 for piece in pieces) > MAX_WORK:
        longest = max(map(len, pieces))
        raise UnsupportedError(f"{source}: length of the longest piece = {longest}; expected the length of a word.")


def ranked_merges(pieces: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return every way to join two pieces into a third, in the order of the pieces that result.

    Args:
        pieces: the best first; no two are equals.
    """
    return [split for piece in pieces for split in _splits(piece, pieces)]


def scored_merges(scores: Mapping[str, float], source: object) -> list[tuple[str, str]]:
    """Return every way to join two pieces into a third, in the order of the scores of the pieces that result.

    Args:
        scores: finite scores by piece.
        source: the file, for the message.

    Raises:
        UnsupportedError: two pieces that can compete for one character have the same score, and no list of merges can
            then say which of them is formed. Or the pieces are too long.
    """
    check_work(scores, source)
    splits = {piece: _splits(piece, scores) for piece in scores}
    tied = {}
    for piece, ways in splits.items():
        if ways:
            tied.setdefault(scores[piece], []).append(piece)
    for score, pieces in tied.items():
        if len(pieces) > 1 and (pair := _competitors(pieces)):
            raise UnsupportedError(
                f"{source}: score of {shown(pair[0])} and {shown(pair[1])} = {score}; expected different scores for "
                "pieces that can overlap."
            )
    # Equals that meet are runs of one character, and the longest of those is the leftmost.
    best_first = sorted(scores, key=lambda piece: (-scores[piece], -len(piece)))
    return [split for piece in best_first for split in splits[piece]]


def _splits(piece: str, pieces: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the ways to join two pieces into this one, in any order.

    Two of them could compete as L M R with LM = MR = the piece. Scores in order do not leave such a row standing: none
    came up in tens of thousands of random vocabularies.
    """
    splits = [(piece[:end], piece[end:]) for end in range(1, len(piece))]
    return [(left, right) for left, right in splits if left in pieces and right in pieces]


def _competitors(pieces: list[str]) -> tuple[str, str] | None:
    """Return two pieces of which one ends as the other begins, unless both are runs of one character.

    A run grows from its left end, as in "4 2 1 1": the leftmost pair that can be joined, here 4 and 2, makes a piece no
    shorter than any other pair (2 and 1, or 1 and 1) does. So the longest first is the leftmost first.
    """
    by_beginning = {}
    for piece in pieces:
        for end in range(1, len(piece)):
            by_beginning.setdefault(piece[:end], []).append(piece)
    for piece in pieces:
        for start in range(1, len(piece)):
            for other in by_beginning.get(piece[start:], ()):
                if other != piece and not (_is_run(piece) and _is_run(other)):
                    return piece, other
    return None


def _is_run(piece: str) -> bool:
    return piece == piece[0] * len(piece)
