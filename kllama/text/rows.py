"""Rows of token ids with what the loss counts in them: cut to a length, and padded into arrays, in NumPy.

It knows no text and no vocabulary; the preprocessor makes the rows and calls it.
"""

from itertools import chain
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """The token ids of one sample, before padding.

    Attributes:
        ids: the token ids.
        counts: for each of them whether the loss counts it.
        num_start: how many ids at the start a cut never takes: the start token.
        num_end: how many ids at the end a cut on the right never takes: the end token.
    """

    ids: list[int]
    counts: list[bool]
    num_start: int = 0
    num_end: int = 0


def cut(row: Row, width: int, side: str) -> Row:
    """Take tokens from one side of a row until it has `width` of them.

    ```
    <s> a b c d </s>   width 4, "right":   <s> a b </s>
                       width 4, "left":    <s> c d </s>
    ```

    An end token that counts ends what precedes it: where a cut on the right leaves nothing that counts, it does not
    count either, lest the model learn to end prompts that are long.
    """
    if len(row.ids) <= width:
        return row
    if side == "left":
        num_tail = max(0, width - row.num_start)
        first = len(row.ids) - num_tail
        return row._replace(
            ids=row.ids[: row.num_start] + row.ids[first:], counts=row.counts[: row.num_start] + row.counts[first:]
        )
    num_head = max(0, width - row.num_end)
    end = len(row.ids) - row.num_end
    counts = row.counts[:num_head]
    return row._replace(
        ids=row.ids[:num_head] + row.ids[end:],
        counts=counts + [any(counts) and count for count in row.counts[end:]],
    )


def pad(rows: list[Row], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give rows as ids int32, their mask bool, and what counts bool, each (B, width), with padding on the right."""
    lengths = np.array([len(row.ids) for row in rows], "int64")
    padding_mask = np.arange(width) < lengths[:, None]
    token_ids = np.full(padding_mask.shape, pad_id, "int32")
    token_ids[padding_mask] = np.fromiter(chain.from_iterable(row.ids for row in rows), "int32", lengths.sum())
    counts = np.zeros(padding_mask.shape, bool)
    counts[padding_mask] = np.fromiter(chain.from_iterable(row.counts for row in rows), bool, lengths.sum())
    return token_ids, padding_mask, counts
