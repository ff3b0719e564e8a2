"""Rotary position embedding: which angle each pair of a head turns by at each position, for every rope type.

The frequencies are computed here on the host, in NumPy, so that every backend turns by the same bits. Positions and
angles are float32 in every compute dtype: bfloat16 positions break above 256.

References: Su et al., "RoFormer" (arXiv:2104.09864), section 3.2; Peng et al., "YaRN" (arXiv:2309.00071), sections
3.2 to 3.4; Ding et al., "LongRoPE" (arXiv:2402.13753); the frequency-dependent scaling of Meta's Llama 3.1.
"""

import math
from collections.abc import Mapping

import numpy as np

from kllama import backend


class RotaryFrequencies:
    """The frequencies of one model's rotary embedding.

    Args:
        head_dim: H, even.
        max_wavelength: theta, the base of the geometric series of frequencies.
        rope_scaling: None or a mapping that `core.rope_scaling.check_rope_scaling` has checked.
        max_sequence_length: the model's longest sequence (Hugging Face's `max_position_embeddings`); `dynamic` needs
            it, and `yarn` and `longrope` where they hold no factor.
    """

    def __init__(
        self,
        head_dim: int,
        max_wavelength: float,
        rope_scaling: Mapping | None = None,
        max_sequence_length: int | None = None,
    ):
        self._scaling = dict(rope_scaling or {"rope_type": "default"})
        self._max_sequence_length = max_sequence_length
        self._wavelength = float(max_wavelength)
        self._exponents = np.arange(0, head_dim, 2, dtype="float32") / np.float32(head_dim)
        self._head_dim = head_dim

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the number of positions of a call."""
        return self._scaling["rope_type"] in ("dynamic", "longrope")

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by: 1 but for `yarn` and `longrope`."""
        given = self._scaling.get("attention_factor")
        if given is not None:
            return float(given)
        if self._scaling["rope_type"] == "yarn":
            return self._yarn_attention_factor()
        if self._scaling["rope_type"] == "longrope" and self._factor > 1:
            return math.sqrt(1 + math.log(self._factor) / math.log(self._original_length))
        return 1.0

    def at(self, length, like):
        """Give the inverse frequencies for a call.

        Args:
            length: number of positions of the call (the largest position + 1), an int or an int32 scalar; read only
                where `depends_on_length`.
            like: a tensor on the device where the result is wanted.

        Returns:
            float32 tensor (H / 2,), in radians per position.
        """
        rope_type = self._scaling["rope_type"]
        if rope_type == "dynamic":
            return self._dynamic(length, like)
        if rope_type == "longrope":
            long, short = self._longrope("long_factor"), self._longrope("short_factor")
            is_long = backend.constant(np.array(self._original_length, "int32"), like) < length
            return backend.where(is_long, backend.constant(long, like), backend.constant(short, like))
        return backend.constant(self._static(rope_type), like)

    def _static(self, rope_type: str) -> np.ndarray:
        if rope_type == "linear":
            return _inverse(self._wavelengths) / np.float32(self._factor)
        if rope_type == "yarn":
            return self._yarn()
        if rope_type == "llama3":
            return self._llama3()
        return _inverse(self._wavelengths)

    @property
    def _wavelengths(self) -> np.ndarray:
        # theta ** (2 i / H). PyTorch's float32 power is all but always correctly rounded, NumPy's is not: rounding a
        # float64 power gives the bits of the reference.
        return np.power(self._wavelength, self._exponents.astype("float64")).astype("float32")

    @property
    def _factor(self) -> float:
        factor = self._scaling.get("factor")
        return float(factor) if factor is not None else self._max_sequence_length / self._original_length

    @property
    def _original_length(self) -> int:
        return self._scaling.get("original_max_position_embeddings") or self._max_sequence_length

    def _dynamic(self, length, like):
        # theta' = theta * stretch ** (H / (H - 2)), so the frequencies theta' ** (-2 i / H) are the plain ones times
        # stretch ** (-2 i / (H - 2)).
        limit = float(self._max_sequence_length)
        length = backend.cast(backend.constant(np.zeros((), "int32"), like) + length, "float32")
        stretch = self._factor * backend.maximum(length, limit) / limit - (self._factor - 1)
        powers = self._exponents * np.float32(self._head_dim / (self._head_dim - 2))
        return backend.constant(_inverse(self._wavelengths), like) / stretch ** backend.constant(powers, like)

    def _longrope(self, which: str) -> np.ndarray:
        return _inverse(np.asarray(self._scaling[which], "float32") * self._wavelengths)

    def _llama3(self) -> np.ndarray:
        low, high = self._scaling["low_freq_factor"], self._scaling["high_freq_factor"]
        frequencies = _inverse(self._wavelengths)
        rotations = self._original_length * frequencies / np.float32(2 * math.pi)
        smooth = np.clip((rotations - np.float32(low)) / np.float32(high - low), 0, 1)
        slowed = frequencies / np.float32(self._factor)
        return np.where(smooth == 1, frequencies, (1 - smooth) * slowed + smooth * frequencies).astype("float32")

    def _yarn(self) -> np.ndarray:
        low, high = self._yarn_correction_range()
        ramp = (np.arange(self._head_dim // 2, dtype="float32") - np.float32(low)) / np.float32(high - low)
        keep = 1 - np.clip(ramp, 0, 1)
        slowed = _inverse(np.float32(self._factor) * self._wavelengths)
        return slowed * (1 - keep) + _inverse(self._wavelengths) * keep

    def _yarn_correction_range(self) -> tuple[float, float]:
        """Give the pair indices between which YaRN blends from kept to slowed frequencies."""

        def pair_that_turns(rotations):
            ratio = self._original_length / (rotations * 2 * math.pi)
            return self._head_dim * math.log(ratio) / (2 * math.log(self._wavelength))

        low = pair_that_turns(self._scaling.get("beta_fast") or 32)
        high = pair_that_turns(self._scaling.get("beta_slow") or 1)
        if self._scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self._head_dim - 1)
        return low, high + 0.001 if low == high else high

    def _yarn_attention_factor(self) -> float:
        def magnitude(scale):
            return 0.1 * scale * math.log(self._factor) + 1 if self._factor > 1 else 1.0

        mscale, mscale_all_dim = self._scaling.get("mscale"), self._scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            return magnitude(mscale) / magnitude(mscale_all_dim)
        return magnitude(1)


@backend.one_program("attention_factor", "dtype")
def rotary_tables(positions, frequencies, attention_factor: float, dtype) -> tuple:
    """Compute the cosines and sines of all angles of a call.

    Args:
        positions: absolute positions from 0, int32 (T,) or (B, T).
        frequencies: inverse frequencies in radians per position, float32 (H / 2,).
        attention_factor: what both tables are multiplied by.
        dtype: of the result; everything before is float32.

    Returns:
        `(cos, sin)`, each (1 or B, T, 1, H / 2), ready to multiply heads (B, T, N, H / 2).
    """
    if len(positions.shape) == 1:
        positions = positions[None]
    angles = (backend.cast(positions, "float32")[..., None] * frequencies)[:, :, None]
    return (
        backend.cast(backend.cos(angles) * attention_factor, dtype),
        backend.cast(backend.sin(angles) * attention_factor, dtype),
    )


def _inverse(wavelengths: np.ndarray) -> np.ndarray:
    return np.float32(1) / wavelengths
