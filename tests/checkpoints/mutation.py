"""Damage to the bytes of a sound file: the same seed gives the same damage, on every machine.

What a mutant of a file means is for the test to say; here are only bytes.
"""

import random
from collections.abc import Callable, Sequence

# What is written over an integer of 1, 2, 4 or 8 bytes, in either order of bytes.
EXTREMES = (0, 1, 2, -1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63))
MOST = 3  # changes in one mutant


def mutate(data: bytes, seed: int, places: Sequence[range] = ()) -> bytes:
    """Return `data` with one to three changes: never the same bytes, unless a change undoes another.

    Args:
        data: the bytes of a sound file.
        seed: which mutant.
        places: ranges of bytes that say what the others mean (headers, directories). Three changes of four begin in
            one of these, the rest anywhere: most files are numbers, and any number there is a sound one.
    """
    random_ = random.Random(seed)
    mutant = bytearray(data)
    for _ in range(random_.randint(1, MOST)):
        change = random_.choice(CHANGES)
        at = _place(random_, len(data), places)
        change(mutant, min(at, len(mutant)), random_)
    return bytes(mutant)


def _place(random_: random.Random, size: int, places: Sequence[range]) -> int:
    if places and random_.random() < 0.75:
        return random_.choice(random_.choice(places))
    return random_.randrange(max(size, 1))


def _flip_bits(data: bytearray, at: int, random_: random.Random) -> None:
    for i in range(at, min(at + random_.choice((1, 1, 2, 8)), len(data))):
        data[i] ^= random_.randrange(1, 256)


def _truncate(data: bytearray, at: int, random_: random.Random) -> None:
    del data[at:]


def _remove(data: bytearray, at: int, random_: random.Random) -> None:
    del data[at : at + random_.choice((1, 4, 64))]


def _insert(data: bytearray, at: int, random_: random.Random) -> None:
    data[at:at] = random_.randbytes(random_.choice((1, 4, 64)))


def _repeat(data: bytearray, at: int, random_: random.Random) -> None:
    """Write a stretch twice: a second entry of a table, a second key of a mapping."""
    stretch = data[at : at + random_.choice((8, 46, 256))]
    data[at:at] = stretch


def _swap(data: bytearray, at: int, random_: random.Random) -> None:
    """Exchange two stretches of one length that do not overlap."""
    length = random_.choice((1, 4, 8, 64))
    other = random_.randrange(max(len(data) - length, 1))
    if at + length <= len(data) and abs(at - other) >= length:
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]


def _overwrite_integer(data: bytearray, at: int, random_: random.Random) -> None:
    width = random_.choice((1, 2, 4, 8))
    value = random_.choice(EXTREMES) % 2 ** (8 * width)
    if at + width <= len(data):
        data[at : at + width] = value.to_bytes(width, random_.choice(("little", "big")))


CHANGES: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    _flip_bits,
    _flip_bits,
    _truncate,
    _remove,
    _insert,
    _repeat,
    _swap,
    _overwrite_integer,
    _overwrite_integer,
    _overwrite_integer,
)
