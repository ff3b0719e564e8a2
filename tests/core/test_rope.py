"""Rotary positions: the frequencies of every rope type, the tables, and what `rope_scaling` may hold."""

import json
import math

import keras
import numpy as np
import pytest
from keras import ops

from kllama.core.rope import RotaryFrequencies, rotary_tables
from kllama.core.rope_scaling import check_rope_scaling
from kllama.layers.rotary_embedding import RotaryEmbedding
from tests import oracle

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
}


def frequencies(head_dim, theta, scaling=None, max_length=None, length=None):
    """Run kllama's: (inverse frequencies as NumPy, attention factor)."""
    if scaling is not None:
        scaling = check_rope_scaling(scaling, head_dim, max_length)
    rotary = RotaryFrequencies(head_dim, theta, scaling, max_length)
    assert rotary.depends_on_length == ((scaling or {}).get("rope_type") in ("dynamic", "longrope"))
    like = ops.zeros((1, 1), "int32")
    return ops.convert_to_numpy(rotary.at(length, like)), rotary.attention_factor


def tables(positions, *args, dtype="float32", **kwargs):
    """Cosines and sines of positions, (T, H / 2), in the table's own dtype but as float32 NumPy."""
    inverse, factor = frequencies(*args, **kwargs)
    positions = ops.convert_to_tensor(np.asarray(positions, "int32"))
    both = rotary_tables(positions, ops.convert_to_tensor(inverse), factor, dtype)
    assert [keras.backend.standardize_dtype(table.dtype) for table in both] == [dtype, dtype]
    return [ops.convert_to_numpy(ops.cast(table, "float32"))[0, :, 0] for table in both]


class TestRecordedFrequencies:
    """`goldens/rope.json`: what transformers computed."""

    # kllama rounds theta ** (2 i / H) correctly. PyTorch, whose powers these are, does so too but for one of these 448:
    # theta 1e6, i = 37. `dynamic` takes another power, of another base, on the device.
    ENTRIES_OFF_BY_ONE_BIT = {"yarn_4_theta1e6": [37]}
    NEARLY = {"dynamic_2_at_4096", "dynamic_10_at_16384"}
    NAMES = [
        "default_1e4",
        "default_5e5",
        "linear_4",
        "dynamic_2_short",
        "dynamic_2_at_4096",
        "dynamic_10_at_16384",
        "yarn_4",
        "yarn_4_theta1e6",
        "yarn_beta_attention_factor",
        "longrope_short",
        "longrope_long",
        "llama3_1",
        "llama3_2",
        "llama3_2_1b_head64",
    ]

    @pytest.fixture
    def cases(self, assets):
        cases = json.loads((assets / "goldens" / "rope.json").read_text())["cases"]
        return {case["name"]: case for case in cases}

    def compute(self, case, function=frequencies, *args):
        scaling = {"rope_type": case["rope_type"], **case.get("parameters", {})}
        return function(
            *args,
            case["head_dim"],
            case["rope_theta"],
            None if case["rope_type"] == "default" else scaling,
            max_length=case["max_position_embeddings"],
            length=case["sequence_length"],
        )

    def test_every_case_is_named(self, cases):
        assert list(cases) == self.NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_frequencies(self, cases, name):
        inverse, factor = self.compute(cases[name])
        expected = np.array(cases[name]["inv_freq"], "float32")
        assert inverse.dtype == "float32"
        if name in self.NEARLY:
            np.testing.assert_allclose(inverse, expected, rtol=1e-6)
        else:
            assert np.nonzero(inverse != expected)[0].tolist() == self.ENTRIES_OFF_BY_ONE_BIT.get(name, [])
            np.testing.assert_array_max_ulp(inverse, expected, maxulp=1)
        assert factor == pytest.approx(cases[name]["attention_factor"], abs=1e-12)

    @pytest.mark.parametrize("name", ["default_1e4", "yarn_4", "llama3_1"])
    def test_tables(self, cases, name):
        both = self.compute(cases[name], tables, cases[name]["positions"])
        for table, which in zip(both, ("cos", "sin"), strict=True):
            np.testing.assert_allclose(table, cases[name][which], rtol=0, atol=1.3e-7)


class TestKnownValues:
    """H = 16, values from the definitions; no test data needed."""

    LLAMA3_8 = [1, 0.19392276, 0.037606031, 0.0072926651, 5.2484602e-4, 3.4281024e-5, 6.6478697e-6, 1.2891732e-6]
    LLAMA3_32 = [1, 0.19392276, 0.037606031, 0.0072926651, 4.2955671e-4, 8.5702559e-6, 1.6619674e-6, 3.2229329e-7]
    YARN_4 = [1, 0.25693506, 0.0625, 0.013834965, 0.0025, 7.9056947e-4, 2.5e-4, 7.9056947e-5]
    YARN_WHOLE = [1, 0.30140647, 0.070398636, 0.014383359, *YARN_4[4:]]

    @pytest.mark.parametrize(
        "theta, scaling, expected",
        [
            (1e4, None, [10 ** (-i / 2) for i in range(8)]),
            (1e4, LINEAR, [10 ** (-i / 2) / 8 for i in range(8)]),
            (5e5, LLAMA3, LLAMA3_8),
            (5e5, LLAMA3 | {"factor": 32.0}, LLAMA3_32),
            (1e4, YARN, YARN_4),
            (1e4, YARN | {"truncate": False}, YARN_WHOLE),
        ],
        ids=["default", "linear", "llama3_8", "llama3_32", "yarn", "yarn_not_truncated"],
    )
    def test_frequencies(self, theta, scaling, expected):
        np.testing.assert_allclose(frequencies(16, theta, scaling)[0], expected, rtol=2e-7)

    @pytest.mark.parametrize("length, second", [(17, 0.310951), (32, 0.270296), (16, 0.31622776), (1, 0.31622776)])
    def test_dynamic(self, length, second):
        assert frequencies(16, 1e4, DYNAMIC, 16, length)[0][1] == pytest.approx(second, abs=5e-7)

    @pytest.mark.parametrize(
        "scaling, expected",
        [
            (YARN, 1.138629436),
            (YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}, 0.964326915),
            (YARN | {"mscale": 0.707}, 1.138629436),
            (YARN | {"attention_factor": 0.9}, 0.9),
            (YARN | {"factor": 1.0}, 1.0),
            (LONGROPE, 1.1055415968),
            (LONGROPE | {"attention_factor": 1.5}, 1.5),
            (LONGROPE | {"factor": 1.0}, 1.0),
            (LINEAR, 1.0),
            (LLAMA3, 1.0),
        ],
    )
    def test_attention_factor(self, scaling, expected):
        assert frequencies(16, 1e4, scaling, 2048, 1)[1] == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("base", [YARN | {"truncate": False}, LONGROPE], ids=["yarn", "longrope"])
    def test_factor_defaults_to_the_ratio_of_the_lengths(self, base):
        without = {key: value for key, value in base.items() if key != "factor"}
        for got, expected in zip(
            frequencies(16, 1e4, without, 2048, 600), frequencies(16, 1e4, base, 999, 600), strict=True
        ):
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("base", [YARN | {"truncate": False}, LONGROPE], ids=["yarn", "longrope"])
    def test_original_length_defaults_to_the_longest(self, base):
        without = {key: value for key, value in base.items() if not key.startswith("original")}
        for got, expected in zip(
            frequencies(16, 1e4, without, 512, 600), frequencies(16, 1e4, base, 999, 600), strict=True
        ):
            np.testing.assert_array_equal(got, expected)

    def test_longrope_switches_past_the_original_length(self):
        default = np.array([10 ** (-i / 2) for i in range(8)])
        at_512, at_513 = (frequencies(16, 1e4, LONGROPE, 2048, length)[0] for length in (512, 513))
        np.testing.assert_allclose(at_512, default / LONGROPE["short_factor"], rtol=2e-7)
        np.testing.assert_allclose(at_513, default / LONGROPE["long_factor"], rtol=2e-7)

    def test_random_parameters_agree_with_the_definitions(self):
        rng = np.random.default_rng(0)
        for _ in range(40):
            case = random_case(rng)
            inverse, factor = frequencies(*case)
            expected, expected_factor = oracle.rope_frequencies(*case)
            np.testing.assert_allclose(inverse, expected, rtol=5e-6, err_msg=repr(case))
            assert factor == pytest.approx(expected_factor, rel=1e-12), case


def random_case(rng) -> tuple:
    """Draw arguments of `frequencies`: (head_dim, theta, scaling, max_length, length)."""
    head_dim = 2 * int(rng.integers(2, 33))
    factor, original = float(rng.uniform(1, 20)), int(rng.integers(64, 5000))
    stretches = np.sort(rng.uniform(1, 20, head_dim)).tolist()
    scaling = [
        {"rope_type": "linear", "factor": factor},
        {"rope_type": "dynamic", "factor": factor},
        LLAMA3
        | {
            "factor": factor,
            "low_freq_factor": float(rng.uniform(0.5, 2)),
            "high_freq_factor": float(rng.uniform(3, 9)),
            "original_max_position_embeddings": original,
        },
        {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": float(rng.uniform(8, 60)),
            "beta_slow": float(rng.uniform(0.5, 4)),
            "mscale": float(rng.uniform(0.1, 2)),
            "mscale_all_dim": float(rng.uniform(0.1, 2)),
            "truncate": bool(rng.integers(2)),
        },
        {
            "rope_type": "longrope",
            "factor": factor,
            "original_max_position_embeddings": original,
            "short_factor": stretches[: head_dim // 2],
            "long_factor": stretches[head_dim // 2 :],
        },
    ][rng.integers(5)]
    return head_dim, float(10 ** rng.uniform(3, 6)), scaling, int(rng.integers(100, 5000)), int(rng.integers(1, 9999))


class TestTables:
    def test_linear_factor_stretches_the_positions(self):
        """KH-S5: with factor 8, position 8 p turns by what position p turns by without."""
        positions = np.arange(200)
        for scaled, plain in zip(tables(8 * positions, 64, 1e4, LINEAR), tables(positions, 64, 1e4), strict=True):
            np.testing.assert_array_equal(scaled, plain)
        assert not np.allclose(tables(positions, 64, 1e4, LINEAR)[0], tables(positions, 64, 1e4)[0], atol=0.1)

    @pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2**-8), ("float16", 2**-11)])
    def test_half_precision_tables_are_rounded_float32_tables(self, dtype, tolerance):
        positions = np.arange(2048)
        half, full = tables(positions, 8, 1e4, dtype=dtype), tables(positions, 8, 1e4)
        for rounded, table in zip(half, full, strict=True):
            np.testing.assert_allclose(rounded, table, rtol=0, atol=tolerance / 2 + 1e-7)
        # bfloat16 cannot tell 257 from 256, nor float16 2049 from 2048; the angles must.
        first = np.stack([table[:, 0] for table in half], -1)
        assert np.abs(np.diff(first, axis=0)).max(-1).min() > 0.1

    @pytest.mark.parametrize("position", [0, 255, 8191, 131071])
    def test_angles_are_those_of_the_float32_formula(self, position):
        """N10: the rounded product of two float32 numbers, not the exact one."""
        inverse, _ = frequencies(64, 5e5, LLAMA3)
        angles = (np.float32(position) * inverse).astype("float64")
        cos, sin = tables([position], 64, 5e5, LLAMA3)
        np.testing.assert_allclose(cos[0], np.cos(angles), rtol=0, atol=1.3e-7)
        np.testing.assert_allclose(sin[0], np.sin(angles), rtol=0, atol=1.3e-7)

    def test_positions_of_each_row(self):
        positions = np.array([[0, 1, 2], [5, 9, 200]], "int32")
        inverse = ops.convert_to_tensor(frequencies(8, 1e4)[0])
        cos, sin = rotary_tables(ops.convert_to_tensor(positions), inverse, 1.0, "float32")
        assert tuple(cos.shape) == tuple(sin.shape) == (2, 3, 1, 4)
        expected = tables([5, 9, 200], 8, 1e4)[0]
        np.testing.assert_allclose(ops.convert_to_numpy(cos)[1, :, 0], expected, rtol=0, atol=1.3e-7)


class TestLength:
    """Types that change with the length take it from real positions."""

    def layer_tables(self, scaling, *args, max_length=8, **kwargs):
        layer = RotaryEmbedding(16, 1e4, scaling, max_length)
        return ops.convert_to_numpy(layer(*args, **kwargs)[0])[0, :, 0]

    def token_ids(self, length):
        return ops.zeros((2, length), "int32")

    def mask(self, *rows):
        return ops.convert_to_tensor(np.array(rows, "int32"))

    def test_dynamic_has_no_effect_up_to_the_limit(self):
        for length in (1, 7, 8):
            ids = self.token_ids(length)
            np.testing.assert_array_equal(self.layer_tables(DYNAMIC, ids), self.layer_tables(None, ids))
        assert not np.allclose(
            self.layer_tables(DYNAMIC, self.token_ids(9)), self.layer_tables(None, self.token_ids(9))
        )

    SHORT = LONGROPE | {"original_max_position_embeddings": 8}

    @pytest.mark.parametrize("scaling", [DYNAMIC, SHORT], ids=["dynamic", "longrope"])
    def test_padding_does_not_count(self, scaling):
        alone = self.layer_tables(scaling, self.token_ids(8))
        padded = self.layer_tables(scaling, self.token_ids(12), self.mask([1] * 5 + [0] * 7, [1] * 8 + [0] * 4))
        np.testing.assert_array_equal(padded[:8], alone)
        assert not np.allclose(self.layer_tables(scaling, self.token_ids(12))[:8], alone, atol=1e-3)

    @pytest.mark.parametrize("scaling", [DYNAMIC, SHORT], ids=["dynamic", "longrope"])
    def test_left_padding_and_holes_count_as_positions(self, scaling):
        alone = self.layer_tables(scaling, self.token_ids(10))
        padded = self.layer_tables(
            scaling, self.token_ids(12), self.mask([0] * 12, [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0])
        )
        np.testing.assert_array_equal(padded[:10], alone)

    @pytest.mark.parametrize("scaling", [DYNAMIC, SHORT], ids=["dynamic", "longrope"])
    def test_length_of_a_cached_call_is_given(self, scaling):
        whole = self.layer_tables(scaling, self.token_ids(11))
        start, length = (ops.convert_to_tensor(np.int32(x)) for x in (10, 11))
        np.testing.assert_array_equal(
            self.layer_tables(scaling, self.token_ids(1), start_index=start, length=length), whole[10:]
        )
        np.testing.assert_array_equal(self.layer_tables(scaling, self.token_ids(1), start_index=10), whole[10:])


FACTORS = [1.0] * 8
WRONG = [
    ("linear", {}, "factor", []),
    ("linear", {"factor": 0.5}, "factor", ["0.5", "at least 1"]),
    ("linear", {"factor": None}, "factor", ["None", "at least 1"]),
    ("linear", {"factor": "4"}, "factor", ["'4'", "at least 1"]),
    ("linear", {"factor": True}, "factor", ["True", "at least 1"]),
    ("linear", {"factor": math.nan}, "factor", ["nan", "at least 1"]),
    ("linear", {"factor": math.inf}, "factor", ["inf", "at least 1"]),
    ("linear", {"factor": 2.0, "beta_fast": 3}, "beta_fast", ["unknown"]),
    ("linear", {"factor": 2.0, "rope_theta": 1e4}, "rope_theta", ["unknown"]),
    ("dynamic", {}, "factor", []),
    ("dynamic", {"factor": 0}, "factor", ["0", "at least 1"]),
    (
        "dynamic",
        {"factor": 2.0, "original_max_position_embeddings": 8},
        "original_max_position_embeddings",
        ["unknown"],
    ),
    ("yarn", {"factor": -1}, "factor", ["-1", "at least 1"]),
    (
        "yarn",
        {"original_max_position_embeddings": 512.5},
        "original_max_position_embeddings",
        ["512.5", "positive integer"],
    ),
    ("yarn", {"original_max_position_embeddings": 0}, "original_max_position_embeddings", ["0", "positive integer"]),
    ("yarn", {"truncate": 1}, "truncate", ["1", "True or False"]),
    ("yarn", {"beta_fast": "32"}, "beta_fast", ["'32'", "at least 0"]),
    ("yarn", {"beta_slow": -1}, "beta_slow", ["-1", "at least 0"]),
    ("yarn", {"attention_factor": -0.5}, "attention_factor", ["-0.5", "at least 0"]),
    ("yarn", {"mscale": math.nan}, "mscale", ["nan", "at least 0"]),
    ("yarn", {"mscale_all_dim": []}, "mscale_all_dim", ["[]", "at least 0"]),
    ("longrope", {"short_factor": FACTORS}, "long_factor", []),
    ("longrope", {"short_factor": FACTORS, "long_factor": FACTORS[1:]}, "long_factor", ["8", "head_dim / 2"]),
    ("longrope", {"short_factor": [0.0] * 8, "long_factor": FACTORS}, "short_factor", ["0.0", "positive"]),
    ("longrope", {"short_factor": "12345678", "long_factor": FACTORS}, "short_factor", ["'12345678'", "list of 8"]),
    ("longrope", {"short_factor": ["1"] * 8, "long_factor": FACTORS}, "short_factor", ["'1'", "positive numbers"]),
    *[
        ("llama3", {key: value for key, value in LLAMA3.items() if key not in (missing, "rope_type")}, missing, [])
        for missing in LLAMA3
        if missing != "rope_type"
    ],
    *[
        ("llama3", LLAMA3 | {key: None}, key, ["None"])
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ],
    ("llama3", LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor", ["4.0", "less than"]),
    ("llama3", LLAMA3 | {"high_freq_factor": "4"}, "high_freq_factor", ["'4'", "at least 0"]),
]


@pytest.mark.backend_independent
class TestCheckRopeScaling:
    @pytest.mark.parametrize("rope_type, values, key, words", WRONG, ids=lambda value: str(value)[:40])
    def test_wrong_value(self, rope_type, values, key, words):
        with pytest.raises(ValueError) as caught:
            check_rope_scaling(values | {"rope_type": rope_type}, 16, 64)
        for word in [key, *words]:
            assert word in str(caught.value)

    @pytest.mark.parametrize("rope_type", ["su", "default", "Linear", None, 3, ["linear"], {"a": 1}])
    def test_unknown_type(self, rope_type):
        with pytest.raises(ValueError, match="rope_type") as caught:
            check_rope_scaling({"rope_type": rope_type, "factor": 2.0}, 16, 64)
        assert repr(rope_type) in str(caught.value)
        assert all(name in str(caught.value) for name in ("linear", "dynamic", "yarn", "longrope", "llama3"))

    @pytest.mark.parametrize("value", ["linear", ["linear"], 2.0, ("linear", 2.0)])
    def test_no_mapping(self, value):
        with pytest.raises(TypeError, match="rope_scaling .* mapping") as caught:
            check_rope_scaling(value, 16, 64)
        assert repr(value) in str(caught.value)

    def test_no_type(self):
        with pytest.raises(ValueError, match=r"rope_type.*None"):
            check_rope_scaling({"factor": 2.0}, 16, 64)

    @pytest.mark.parametrize(
        "scaling",
        [
            DYNAMIC,
            {"rope_type": "yarn", "factor": 4.0},
            {"rope_type": "yarn", "original_max_position_embeddings": 512},
            {"rope_type": "longrope", "factor": 4.0, "short_factor": FACTORS, "long_factor": FACTORS},
        ],
    )
    def test_types_that_need_the_longest_sequence(self, scaling):
        assert check_rope_scaling(scaling, 16, 64) == scaling
        with pytest.raises(ValueError, match=r"max_sequence_length \(None\)"):
            check_rope_scaling(scaling, 16, None)

    @pytest.mark.parametrize("scaling", [LINEAR, DYNAMIC, YARN, LONGROPE, LLAMA3], ids=lambda s: s["rope_type"])
    def test_gives_a_copy(self, scaling):
        before = json.dumps(scaling)
        checked = check_rope_scaling(scaling, 16, 64)
        assert checked == scaling and checked is not scaling
        assert json.dumps(scaling) == before

    def test_older_name_of_the_type(self):
        assert check_rope_scaling({"factor": 2.0, "type": "linear"}, 16, None) == {"rope_type": "linear", "factor": 2.0}
