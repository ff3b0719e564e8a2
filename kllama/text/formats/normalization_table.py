"""Read SentencePiece's table of normalization, and run it exactly where only known words count.

The table maps characters, and sequences of them, to other text. SentencePiece replaces the longest sequence at each
place, while the Rust library works by grapheme and differs on accents. Where all that counts is which words of a text
are pieces, replacing single characters is enough, and that is checked here. `sentencepiece_words.py` calls it.
"""

import re
import struct
from collections.abc import Mapping

import numpy as np

from kllama.checkpoints.files.reader import shown
from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.rules import MARK, replace

_OTHER = "\ue000"  # stands for whatever no piece has
_WORD = re.compile(f"[^ {MARK}]+")
# Those of SentencePiece's own tables: 12 bytes, 33 bytes, and 260 000 nodes.
_MAX_KEY_BYTES = 64
_MAX_TEXT_BYTES = 256
_MAX_NODES = 2**20


def read_table(blob: bytes, source: object) -> dict[str, str]:
    """Return what a table replaces by what.

    It is a trie of UTF-8 (a Darts double array) and the texts that its leaves point to. A unit of the array has a label
    in bits 0 to 7 and 31, whether it has a leaf in bit 8, and the offset of its children in bits 10 to 30, with bit 9
    for a factor of 256. The child for a byte is at offset XOR byte, and labelled with the byte.

    Raises:
        CheckpointError: a damaged table.
    """
    units, texts = _split_blob(blob, source)
    labels = units & np.uint32(0x800000FF)
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    children, bases = _by_base(labels)
    nodes, keys = offsets[:1], np.zeros((1, 0), "uint8")
    replaced, starts = [], []
    num_nodes = 0
    while len(nodes):
        first = np.searchsorted(bases, nodes, "left")
        counts = np.searchsorted(bases, nodes, "right") - first
        num_nodes += int(counts.sum())
        if num_nodes > _MAX_NODES or keys.shape[1] > _MAX_KEY_BYTES:
            raise CheckpointError(f"{source}: precompiled_charsmap runs in circles. Download it again.")
        parents = np.repeat(np.arange(len(nodes)), counts)
        places = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = children[np.repeat(first, counts) + places]
        keys = np.column_stack([keys[parents], labels[found].astype("uint8")])
        nodes = (found ^ offsets[found]).astype("uint32")
        ends = np.flatnonzero(units[found] & 0x100)
        replaced += _decoded(keys[ends], source)
        starts += _starts(units, nodes[ends], source)
    values = _values(starts, texts, source)
    return {key: values[start] for key, start in zip(replaced, starts, strict=True)}


def table_normalizers(table: Mapping[str, str], characters: set[str], source: object) -> list[dict]:
    """Return normalizers after which a text has the same known words, at the same places among its words.

    A word with a character that no piece has is unknown, whatever else is in it. So a sequence need not be replaced as
    a whole where its characters, one by one, give the same known words: e + U+0301 is unknown as é is.

    Args:
        table: as `read_table` returns it.
        characters: those of all pieces, without the mark of a word start.
        source: the file, for messages.

    Raises:
        UnsupportedError: the table changes a character of a piece, or makes one of a sequence.
    """

    def outline(text):
        """Write `_OTHER` for each word that no piece can be."""
        return _WORD.sub(lambda word: word[0] if characters.issuperset(word[0]) else _OTHER, text)

    for character in sorted({*characters, " ", _OTHER}):
        is_other = character == _OTHER and _OTHER in characters
        if is_other or table.get(character, character) != character:
            raise UnsupportedError(
                f"{source}: precompiled_charsmap replaces {shown(character)}, which is part of a piece; expected that "
                "pieces stay what they are."
            )
    by_outline = {}
    for key, value in table.items():
        wanted = outline(value)
        if len(key) == 1:
            if wanted != outline(key):
                by_outline.setdefault(wanted, []).append(key)
        elif wanted != outline("".join(table.get(character, character) for character in key)):
            raise UnsupportedError(
                f"{source}: precompiled_charsmap replaces {shown(key)} as a whole by {shown(value)}, characters of "
                "pieces; expected that of single characters only."
            )
    return [replace({"Regex": _class_of(keys)}, wanted) for wanted, keys in sorted(by_outline.items())]


def _split_blob(blob: bytes, source: object) -> tuple[np.ndarray, bytes]:
    size = struct.unpack_from("<I", blob)[0] if len(blob) >= 4 else 0
    if not 0 < size <= len(blob) - 4 or size % 4:
        raise CheckpointError(f"{source}: precompiled_charsmap of {len(blob)} bytes is cut. Download it again.")
    return np.frombuffer(blob, "<u4", size // 4, 4), blob[4 + size :]


def _by_base(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the units that can be children, and the offset at which each has its siblings, ascending."""
    indices = np.arange(len(labels), dtype="uint32")
    children = indices[(labels > 0) & (labels < 256)]
    bases = children ^ labels[children]
    order = np.argsort(bases, kind="stable")
    return children[order], bases[order]


def _decoded(keys: np.ndarray, source: object) -> list[str]:
    try:
        return [key.tobytes().decode("utf-8") for key in keys]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: precompiled_charsmap is not UTF-8. Download it again.") from error


def _starts(units: np.ndarray, leaves: np.ndarray, source: object) -> list[int]:
    """Return where the texts of some leaves start."""
    if np.any(leaves >= len(units)):
        raise CheckpointError(f"{source}: precompiled_charsmap points to nowhere. Download it again.")
    return (units[leaves] & 0x7FFFFFFF).tolist()


def _values(starts: list[int], texts: bytes, source: object) -> dict[int, str]:
    """Return the text at each start. Texts follow each other, so that together they are not larger than the table."""
    values, num_bytes = {}, 0
    for start in sorted(set(starts)):
        end = texts.find(b"\0", start, start + _MAX_TEXT_BYTES + 1)
        num_bytes += end + 1 - start
        if end < 0 or num_bytes > len(texts):
            raise CheckpointError(
                f"{source}: precompiled_charsmap points to nowhere, into a text, or to one of more than "
                f"{_MAX_TEXT_BYTES} bytes. Download it again."
            )
        try:
            values[start] = texts[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{source}: precompiled_charsmap is not UTF-8. Download it again.") from error
    return values


def _class_of(characters: list[str]) -> str:
    """Return the regular expression of a set of characters."""
    points = sorted(map(ord, characters))
    runs = np.split(points, np.flatnonzero(np.diff(points) != 1) + 1)
    return "[" + "".join(rf"\x{{{run[0]:x}}}-\x{{{run[-1]:x}}}" for run in runs) + "]"
