"""The random numbers that sampling consumes: made on the host, the same on every backend, and passed to the programs.

Each row has a stream of its own, and each token after the prompt a number of its own in it, so neither the length of a
prompt nor the size of a chunk changes what is drawn.

Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 4 (Philox).
"""

from collections.abc import Iterable

import numpy as np

_BLOCK = 4  # numbers that Philox makes for one value of its counter


def uniform_numbers(seed: int, rows: Iterable[int], start: int, count: int) -> np.ndarray:
    """Give the numbers `start` to `start + count - 1` of the streams of some rows: float32 (B, count) in [0, 1).

    They are multiples of 2 ** -23, so that the largest one times a sum stays below that sum.

    Args:
        seed: integer of at most 64 bits.
        rows: the number of each row in its batch.
        start: how many numbers were consumed before.
        count: how many to give.
    """
    skipped = start % _BLOCK
    streams = (np.random.Philox(key=[seed, row], counter=start // _BLOCK) for row in rows)
    bits = np.stack([stream.random_raw(skipped + count)[skipped:] for stream in streams])
    return (bits >> np.uint64(41)).astype("float32") * np.float32(2**-23)
