"""Texts to compare tokenizers on, and small damaged copies of files."""

import json
import random

import pytest

POOLS = (
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ .,;:!?'\"()-",
    "  \u2581\u2581\t\n\r\x0b\u00a0\u3000",
    "0123456789\u0664\u0966",
    "日本語한국어ñéüßждاלא\u0301\u0308",
    "😀🦙👩\u200d👧🇺🇸",
    "\0\x01\x07\x1f\x7f\u200b\u202e\ufeff\ufffd",
    "<>[]|_/#{}",
)
WORDS = (
    "Once upon a time there's a king's THE don't We'll ingest running internationalization http://x.y code();".split()
)


def make_texts(seed: int, spellings: list[str], count: int = 5000) -> list[str]:
    """Return random texts of words, runs of spaces, code points of all planes, and spellings of special tokens."""
    rng = random.Random(seed)

    def part():
        kind = rng.random()
        if kind < 0.3:
            return rng.choice(["", " "]) + rng.choice(WORDS)
        if kind < 0.45:
            return rng.choice(spellings)
        if kind < 0.55:
            return " " * rng.randint(1, 40)
        if kind < 0.6:
            return chr(rng.choice([rng.randint(1, 0xD7FF), rng.randint(0xE000, 0x10FFFF)]))
        pool = rng.choice(POOLS)
        return "".join(rng.choice(pool) for _ in range(rng.randint(1, 8)))

    return ["".join(part() for _ in range(rng.randint(0, 12))) for _ in range(count)]


@pytest.fixture(scope="session")
def random_texts():
    return make_texts


@pytest.fixture(scope="session")
def golden(assets):
    return {
        name: json.loads((assets / "goldens" / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("mixed_text", "llama_cpp", "special_tokens")
    }


@pytest.fixture(scope="session")
def damaged():
    """Return a function that makes random damage to a file: cut, overwritten, cut out, doubled."""

    def damage(data: bytes, seed: int) -> bytes:
        rng = random.Random(seed)
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice([1, 1, 2, 8, 100]))
        return rng.choice(
            [
                data[:start],
                data[:start] + rng.randbytes(end - start) + data[end:],
                data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 :],
                data[:start] + data[end:],
                data[:end] + data[start:],
                data[:start] + b"\xff\xff\xff\x7f" + data[start + 4 :],
            ]
        )

    return damage
