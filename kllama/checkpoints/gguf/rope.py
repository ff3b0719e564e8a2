"""The position scaling of a GGUF file: its `rope.scaling.*` keys and tables, as the one mapping of kllama.

A GGUF file holds Llama 3's scaling as a table of divisors, one for each frequency; the four numbers behind it are found
again here, and the table they give must be the file's. `config.py` calls it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from kllama.checkpoints.files.reader import listed, shown
from kllama.core.rope_scaling import check_rope_scaling
from kllama.errors import CheckpointError, UnsupportedError

DIVISORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
TABLES = (DIVISORS, SHORT, LONG)
"""The tensors that are no weights but tables of position scaling, each (H / 2,)."""

TYPE, FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
ORIGINAL, ATTENTION = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
BETA_FAST, BETA_SLOW = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
SCALING_KEYS = (FACTOR, OLD_FACTOR, ORIGINAL, ATTENTION, BETA_FAST, BETA_SLOW)
"""Keys that hold a number. What llama.cpp takes for granted where one is absent stands below."""

_TYPES = ("none", "linear", "yarn", "longrope")
# Llama 3.1 to 3.3 have these, with a factor of 8 or 32.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
_LENGTHS = tuple(2**power for power in range(25))
_TOLERANCE = 1e-5  # of divisors: an error of float32 between the bounds, times the factor


def rope_scaling(
    keys: Mapping, tables: Mapping[str, np.ndarray], theta: float, head_dim: int, length: int, source: Path
) -> dict | None:
    """Return the `rope_scaling` of a model, None for plain RoPE.

    Args:
        keys: the keys above that the file has, without the architecture before them.
        tables: the `TABLES` that the file has, finite.
        theta: the base of the frequencies.
        head_dim: H.
        length: the longest sequence that the model is made for.
        source: the file, for messages.

    Raises:
        UnsupportedError: a type that kllama does not have, or divisors that are not Llama 3's.
        CheckpointError: keys or tables that are missing or contradict each other.
    """
    kind, factor = _kind_and_factor(keys, source)
    _check_tables(kind, tables, source)
    if DIVISORS in tables:
        scaling = _llama3(tables[DIVISORS], theta, (keys.get(ORIGINAL, _ORIGINAL), _ORIGINAL), source)
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = _yarn(keys, factor, length)
    elif kind == "longrope":
        scaling = _longrope(keys, tables, length)
    else:
        scaling = None
    attention = keys.get(ATTENTION, 1)
    if kind in ("none", "linear") and attention != 1:
        raise UnsupportedError(f"{source}: {ATTENTION} = {attention} with {TYPE} = {kind}; expected 1.")
    try:
        return None if scaling is None else check_rope_scaling(scaling, head_dim, length)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _kind_and_factor(keys: Mapping, source: Path) -> tuple[str, float]:
    """Return the type and the factor, 1 where there is none. Before there were types, a factor alone meant linear."""
    factors = {key: keys[key] for key in (FACTOR, OLD_FACTOR) if keys.get(key, 0) != 0}
    if len(set(factors.values())) > 1:
        raise CheckpointError(f"{source}: {FACTOR}, {OLD_FACTOR} = {list(factors.values())}; expected the same.")
    factor = next(iter(factors.values()), 1)
    kind = keys.get(TYPE, "linear")
    if kind not in _TYPES:
        raise UnsupportedError(f"{source}: {TYPE} = {shown(kind)}; expected one of {', '.join(_TYPES)}.")
    if kind == "none" and factor != 1:
        raise CheckpointError(f"{source}: {FACTOR} = {factor} with {TYPE} = none; expected 1, or another type.")
    return ("none" if kind == "linear" and factor == 1 else kind), factor


def _check_tables(kind: str, tables: Mapping[str, np.ndarray], source: Path) -> None:
    expected = {"none": ((), (DIVISORS,)), "longrope": ((SHORT, LONG),)}.get(kind, ((),))
    if tuple(name for name in TABLES if name in tables) not in expected:
        received = listed(tables) or "none"
        wanted = " or ".join(" and ".join(names) or "none" for names in expected)
        raise CheckpointError(f"{source}: tables of frequencies = {received} with {TYPE} = {kind}; expected {wanted}.")
    for name, table in tables.items():
        if not np.all(table > 0):
            raise CheckpointError(f"{source}: {name} = {table.min():.3g} somewhere; expected positive numbers.")


def _yarn(keys: Mapping, factor: float, length: int) -> dict:
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": keys.get(ORIGINAL, length)}
    if keys.get(ATTENTION, 1) != 1:  # llama.cpp multiplies what follows from the factor by it
        scaling["attention_factor"] = keys[ATTENTION] * (1 + 0.1 * math.log(max(factor, 1)))
    betas = {"beta_fast": keys.get(BETA_FAST), "beta_slow": keys.get(BETA_SLOW)}
    return {**scaling, **{name: beta for name, beta in betas.items() if beta is not None}}


def _longrope(keys: Mapping, tables: Mapping[str, np.ndarray], length: int) -> dict:
    return {
        "rope_type": "longrope",
        "short_factor": _decimals(tables[SHORT]),
        "long_factor": _decimals(tables[LONG]),
        "original_max_position_embeddings": keys.get(ORIGINAL, length),
        "attention_factor": keys.get(ATTENTION, 1.0),
    }


def _decimals(table: np.ndarray) -> list[float]:
    """Return the shortest decimal numbers that are these in float32."""
    return [float(str(value)) for value in table.astype("float32")]


def _llama3(table: np.ndarray, theta: float, originals: tuple[int, ...], source: Path) -> dict | None:
    """Find the factor, the bounds and the length that give a table of divisors; None for one of ones."""
    table = table.astype("float64")
    if np.all(table == 1):
        return None
    with np.errstate(all="ignore"):  # a guess that does not fit may divide by zero
        scaling = _find_llama3(table, theta, originals)
    if scaling is None:
        raise UnsupportedError(
            f"{source}: {DIVISORS} = {shown(_decimals(table))}; expected the divisors of Llama 3's rope scaling."
        )
    return scaling


def _find_llama3(table: np.ndarray, theta: float, originals: tuple[int, ...]) -> dict | None:
    # How often each pair of a head turns within one position, times which the original length is compared.
    turns = theta ** (-np.arange(len(table)) / len(table)) / (2 * math.pi)
    for low, high, original in _bounds(table, turns, originals):
        smooth = np.clip((original * turns - low) / (high - low), 0, 1)
        if smooth[-1] == 1:
            continue
        slowest = _rounded((1 - smooth[-1]) / (1 / table[-1] - smooth[-1]))
        factor = slowest if smooth[-1] else _decimals(table[-1:])[0]
        if 1 <= factor < 1e30 and np.allclose(1 / ((1 - smooth) / factor + smooth), table, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _bounds(table: np.ndarray, turns: np.ndarray, originals: Iterable[int]) -> Iterator[tuple[float, float, int]]:
    """Yield the low and the high bound and the original length that a table may have, the likeliest first.

    For a pair between the bounds, `1 / divisor` says how far it is from one to the other; where there is none, every
    length gives the same table that parts the pairs at the same place.
    """
    factor = table.max()
    between = (table > 1 + 1e-4) & (table < factor * (1 - 1e-4))
    smooth, turns = (1 / table[between] - 1 / factor) / (1 - 1 / factor), turns[between]
    found = (smooth * (_HIGH - _LOW) + _LOW) / turns
    for original in (*originals, *(round(length) for length in found if 1 <= length < 2**31), *_LENGTHS):
        yield _LOW, _HIGH, original
    if len(smooth) > 1:
        yield from _fitted_bounds(smooth, turns)


def _fitted_bounds(smooth: np.ndarray, turns: np.ndarray) -> list[tuple[float, float, int]]:
    """Return the bounds and the length of a line. Only the ratios of the three numbers can be seen.

    So the low bound is 1, or as near to it as lets the length be an integer.
    """
    slope, offset = map(float, np.polyfit(turns, smooth, 1))
    if not slope > 0 > offset:
        return []
    high = 1 - 1 / offset
    length = slope * (high - 1)
    if not 1 <= length < 2**31:
        return []
    low = round(length) / length
    return [(1.0, _rounded(high), round(length)), (low, low * high, round(length))]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
