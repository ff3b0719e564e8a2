"""The backbone: its arguments, weights, config, padding, and the shape of the program it makes."""

import collections
import functools
import inspect
import json
import math

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.layers import attention as attention_layer
from kllama.layers import rotary_embedding as rotary_layer
from kllama.models.weights import assign_weights, uninitialized_weights
from tests import oracle

SMALL = {
    "vocabulary_size": 23,
    "num_layers": 2,
    "num_query_heads": 6,
    "hidden_dim": 24,
    "intermediate_dim": 14,
    "num_key_value_heads": 2,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 20.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 6,
}
# Every argument off its default.
ODD = SMALL | {
    "rope_max_wavelength": 777.0,
    "layer_norm_epsilon": 0.003,
    "dropout": 0.1,
    "dtype": "mixed_bfloat16",
    "tie_word_embeddings": True,
    "head_dim": 10,
    "rope_scaling": YARN,
    "max_sequence_length": 99,
    "attention_bias": True,
    "attention_output_bias": False,
    "qk_norm": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "mlp_bias": True,
    "activation": "gelu_new",
    "attention_dropout": 0.2,
    "initializer_range": 0.3,
    "name": "odd",
    "trainable": False,
}
# Rows of 9: whole, padded on the right, on the left, on both sides, with holes.
PADDING = np.array(
    [[1] * 9, [1] * 6 + [0] * 3, [0] * 3 + [1] * 6, [0, 1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 1, 1, 1]]
)


def build(**arguments):
    """Build a backbone with random gains and biases; gives it and its weights by path."""
    with uninitialized_weights():
        backbone = kllama.LlamaBackbone(**arguments)
    rng = np.random.default_rng(0)
    weights = {path: oracle.random_weight(path, shape, rng) for path, shape in shapes(backbone).items()}
    assign_weights(backbone, weights.items())
    return backbone, weights


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, SMALL["vocabulary_size"], shape, dtype="int32")


def run(backbone, token_ids, padding_mask=None) -> np.ndarray:
    """Call the backbone directly."""
    return ops.convert_to_numpy(ops.cast(backbone({"token_ids": token_ids, "padding_mask": padding_mask}), "float32"))


def predict(backbone, token_ids, padding_mask=None) -> np.ndarray:
    """Call it through the compiled program of `predict`."""
    return backbone.predict({"token_ids": token_ids, "padding_mask": padding_mask}, verbose=0)


def shapes(model) -> dict:
    return {weight.path: tuple(weight.shape) for weight in model.weights}


@pytest.fixture(scope="module")
def backbone():
    """A small float32 model with random gains and biases."""
    return build(**SMALL, head_dim=10, attention_bias=True, layer_norm_epsilon=1e-5)[0]


class TestAgainstKerasHub:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("changes", [{}, {"num_layers": 1, "num_query_heads": 3, "num_key_value_heads": 3}])
    def test_same_weight_paths_and_shapes(self, changes, tied):
        with uninitialized_weights():
            ours = kllama.LlamaBackbone(**SMALL | changes, tie_word_embeddings=tied)
            theirs = keras_hub.models.LlamaBackbone(**SMALL | changes, tie_word_embeddings=tied)
        assert shapes(ours) == shapes(theirs) and len(shapes(ours)) == len(ours.weights)
        assert all(weight.trainable for weight in ours.weights)

    def test_same_hidden_states(self):
        """Which makes KerasHub's weights usable as they are. Grouped heads, padding on the right."""
        ours, weights = build(**SMALL)
        with uninitialized_weights():
            theirs = keras_hub.models.LlamaBackbone(**SMALL)
        assign_weights(theirs, weights.items())
        token_ids, mask = ids(2, 9), PADDING[:2]
        assert oracle.relative_error(run(ours, token_ids, mask), run(theirs, token_ids, mask), mask) < 1e-5

    def test_is_one_of_its_classes(self, backbone):
        assert isinstance(backbone, keras_hub.models.Backbone)


class TestConfig:
    def test_the_odd_arguments_leave_nothing_at_its_default(self):
        parameters = inspect.signature(kllama.LlamaBackbone.__init__).parameters
        named = {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name != "self"}
        assert named.keys() - ODD.keys() == {"rope_scaling_factor"}  # the shorthand for a rope_scaling
        assert not [name for name in named.keys() & ODD.keys() if named[name].default == ODD[name]]

    def test_config_is_what_the_constructor_took(self):
        config = kllama.LlamaBackbone(**ODD).get_config()
        assert config.pop("dtype")["config"]["name"] == ODD["dtype"]
        assert config == {name: value for name, value in ODD.items() if name != "dtype"}

    def test_numbers_of_numpy_become_json(self):
        numbers = {name: np.int64(value) for name, value in SMALL.items()}
        backbone = kllama.LlamaBackbone(**numbers, rope_max_wavelength=np.float32(500))
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(backbone)))["config"]
        assert {name: config[name] for name in SMALL} == SMALL and config["rope_max_wavelength"] == 500

    @pytest.mark.parametrize("how", ["serialize", "from_config", "clone"])
    @pytest.mark.parametrize("arguments", [ODD, SMALL], ids=["odd", "defaults"])
    def test_rebuilt_backbone_gives_equal_output(self, how, arguments):
        """KH-S1, KH-S2, KH-S3: KerasHub loses the tie flag, and cannot clone."""
        backbone, _ = build(**arguments)
        match how:
            case "serialize":
                config = json.loads(json.dumps(keras.saving.serialize_keras_object(backbone)))
                other = keras.saving.deserialize_keras_object(config)
            case "from_config":
                other = kllama.LlamaBackbone.from_config(backbone.get_config())
            case "clone":
                other = keras.models.clone_model(backbone)
        if how != "clone":  # which Keras makes a plain functional model of the same layers
            assert type(other) is kllama.LlamaBackbone
            assert other.get_config() == backbone.get_config()
        assert shapes(other) == shapes(backbone)
        assert other.count_params() == backbone.count_params()
        other.set_weights(backbone.get_weights())
        np.testing.assert_array_equal(run(backbone, ids(2, 9), PADDING[1:3]), run(other, ids(2, 9), PADDING[1:3]))

    def test_config_shares_nothing_with_what_was_given(self):
        """KH-S9."""
        scaling = dict(YARN)
        backbone = kllama.LlamaBackbone(**SMALL, rope_scaling=scaling)
        assert scaling == YARN
        scaling["factor"] = 99.0
        backbone.get_config()["rope_scaling"]["factor"] = 99.0
        assert backbone.get_config()["rope_scaling"] == YARN

    def test_head_dim_follows_from_the_others(self):
        assert kllama.LlamaBackbone(**SMALL).get_config()["head_dim"] == 4

    @pytest.mark.parametrize(
        "keywords, scaling",
        [
            ({"rope_scaling_factor": 2.5}, LINEAR),
            ({"rope_scaling_factor": 1}, None),
            ({"rope_position_scaling_factor": 2.5}, LINEAR),
            ({"rope_position_scaling_factor": 1.0}, None),
            (
                {
                    "rope_frequency_adjustment_factor": 8.0,
                    "rope_low_freq_factor": 1.0,
                    "rope_high_freq_factor": 4.0,
                    "rope_pretraining_sequence_length": 8192,
                },
                LLAMA3,
            ),
            (
                {
                    "rope_frequency_adjustment_factor": None,
                    "rope_low_freq_factor": None,
                    "rope_high_freq_factor": None,
                    "rope_pretraining_sequence_length": None,
                },
                None,
            ),
        ],
    )
    def test_other_ways_to_ask_for_a_rope_scaling(self, keywords, scaling):
        """The shorthand, and KerasHub 0.32's five keywords."""
        with uninitialized_weights():
            config = kllama.LlamaBackbone(**SMALL, **keywords).get_config()
        assert config["rope_scaling"] == scaling
        assert not config.keys() & keywords.keys()


COUNTS = "vocabulary_size num_layers num_query_heads hidden_dim intermediate_dim num_key_value_heads".split()
OPTIONAL_COUNTS = ["head_dim", "max_sequence_length", "sliding_window"]
POSITIVE = ["rope_max_wavelength", "layer_norm_epsilon"]
RATES = ["dropout", "attention_dropout"]
FLAGS = ["tie_word_embeddings", "attention_bias", "mlp_bias", "qk_norm"]
NO_NUMBERS = ["0.1", True, None, [0.1]]
# (arguments, values, error, what the message allows)
WRONG = [
    (COUNTS + OPTIONAL_COUNTS, [1.5, 4.0, "4", True, [4]], TypeError, "an integer"),
    (COUNTS, [None], TypeError, "an integer"),
    (COUNTS + OPTIONAL_COUNTS, [0, -1], ValueError, "at least 1"),
    (POSITIVE + RATES + ["rope_scaling_factor", "initializer_range"], NO_NUMBERS, TypeError, "a number"),
    (POSITIVE, [0, -1.0, math.nan, math.inf], ValueError, "a positive finite number"),
    (["initializer_range"], [-1.0, math.nan, math.inf], ValueError, "at least 0"),
    (RATES, [-0.1, 1, 1.5, math.nan], ValueError, "at least 0 and less than 1"),
    (["rope_scaling_factor"], [0.5, 0, -2, math.nan, math.inf], ValueError, "at least 1"),
    (FLAGS + ["attention_output_bias"], [1, 0, "True"], TypeError, "True or False"),
    (FLAGS, [None], TypeError, "True or False"),
    (["layer_types"], ["full_attention", 2], TypeError, "a list of str, or None"),
    (["layer_types"], [["full_attention"], ["full_attention", "global"]], ValueError, "for each of the 2 layers"),
    (["layer_types"], [["full_attention", "sliding_attention"]], ValueError, "sliding_window (None) must be given"),
    (["activation"], ["SiLU", "", None, 3, ["silu"], np.tanh], ValueError, "'silu'"),
    (["rope_scaling"], ["linear", 2.0, [LINEAR]], TypeError, "mapping"),
]


class TestArguments:
    """The message names the argument, the value, and what is allowed."""

    @pytest.mark.parametrize(
        "name, value, error, allowed",
        [(name, value, *rest) for names, values, *rest in WRONG for value in values for name in names],
    )
    def test_wrong_value(self, name, value, error, allowed):
        with pytest.raises((TypeError, ValueError)) as caught:
            kllama.LlamaBackbone(**SMALL | {name: value})
        assert caught.type is error
        assert all(word in str(caught.value) for word in (name, str(value), allowed))

    def test_every_argument_has_wrong_values(self):
        parameters = inspect.signature(kllama.LlamaBackbone.__init__).parameters
        assert {name for names, *_ in WRONG for name in names} == parameters.keys() - {"self", "kwargs", "dtype"}

    def test_wrong_rope_scaling(self):
        """All of its refusals are in tests/core/test_rope.py."""
        with pytest.raises(ValueError, match=r"rope_scaling\['factor'\] \(0.5\) .* at least 1"):
            kllama.LlamaBackbone(**SMALL, rope_scaling=LINEAR | {"factor": 0.5})

    @pytest.mark.parametrize(
        "changes, numbers",
        [
            ({"num_query_heads": 4, "num_key_value_heads": 3}, ("num_query_heads (4)", "num_key_value_heads (3)")),
            ({"num_query_heads": 2, "num_key_value_heads": 4}, ("num_query_heads (2)", "num_key_value_heads (4)")),
            ({"hidden_dim": 18, "num_query_heads": 4}, ("hidden_dim (18)", "num_query_heads (4)")),
            ({"head_dim": 5}, ("head_dim (5)", "even")),
            ({"hidden_dim": 18}, ("head_dim (3)", "even")),
        ],
    )
    def test_heads_that_do_not_fit(self, changes, numbers):
        """KH-S7: KerasHub builds these."""
        with pytest.raises(ValueError) as caught:
            kllama.LlamaBackbone(**SMALL | changes)
        assert all(number in str(caught.value) for number in numbers)

    @pytest.mark.parametrize(
        "keyword, nearest",
        [
            ("num_key_value_head", "num_key_value_heads"),
            ("head_dims", "head_dim"),
            ("rope_scalings", "rope_scaling"),
            ("attention_biases", "attention_bias"),
            ("dtypes", "dtype"),
            ("rope_low_freq_factors", "rope_low_freq_factor"),
            ("zzz", None),
        ],
    )
    def test_unknown_keyword(self, keyword, nearest):
        """KH-S6: KerasHub swallows them."""
        with pytest.raises(TypeError, match=f"unknown keyword arguments .*'{keyword}'") as caught:
            kllama.LlamaBackbone(**SMALL, **{keyword: 1})
        assert ("Did you mean" in str(caught.value)) == (nearest is not None)
        assert nearest is None or f"'{nearest}'" in str(caught.value)

    @pytest.mark.parametrize(
        "keywords",
        [
            {"rope_scaling": LINEAR, "rope_scaling_factor": 2.5},
            {"rope_scaling": LLAMA3, "rope_position_scaling_factor": 2.0},
            {"rope_scaling_factor": 2.0, "rope_position_scaling_factor": 2.0},
        ],
    )
    def test_rope_scaling_given_twice(self, keywords):
        with pytest.raises(ValueError, match="more than once"):
            kllama.LlamaBackbone(**SMALL, **keywords)

    @pytest.mark.parametrize("missing", sorted(LLAMA3.keys() - {"rope_type"}))
    def test_keras_hub_keywords_are_all_given_or_none(self, missing):
        names = {
            "factor": "rope_frequency_adjustment_factor",
            "low_freq_factor": "rope_low_freq_factor",
            "high_freq_factor": "rope_high_freq_factor",
            "original_max_position_embeddings": "rope_pretraining_sequence_length",
        }
        keywords = {names[key]: value for key, value in LLAMA3.items() if key not in ("rope_type", missing)}
        with pytest.raises(ValueError, match="all given or all None") as caught:
            kllama.LlamaBackbone(**SMALL, **keywords)
        assert names[missing] in str(caught.value)


# Sizes of the released models: V, L, N, D, F, K, H, tied; and how many parameters they are known to have.
RELEASED = {
    "llama2_7b": ((32000, 32, 32, 4096, 11008, 32, 128, False), 6_738_415_616),
    "llama3_8b": ((128256, 32, 32, 4096, 14336, 8, 128, False), 8_030_261_248),
    "llama3.2_1b": ((128256, 16, 32, 2048, 8192, 8, 64, True), 1_235_814_400),
    "llama3.1_405b": ((128256, 126, 128, 16384, 53248, 8, 128, False), 405_853_388_800),
}


@pytest.mark.parametrize("name", RELEASED)
def test_number_of_parameters(name):
    """Built without the memory for them."""
    (V, L, N, D, F, K, H, tied), known = RELEASED[name]
    with uninitialized_weights():
        backbone = kllama.LlamaBackbone(V, L, N, D, F, K, tie_word_embeddings=tied, head_dim=H, dtype="bfloat16")
    layer = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F + 2 * D
    assert backbone.count_params() == V * D * (1 if tied else 2) + L * layer + D == known
    assert all(weight._value is None for weight in backbone.weights)


class TestForward:
    """Against the float64 oracle (N1)."""

    CASES = {
        "plain": {"num_key_value_heads": 6},
        "biases": {"attention_bias": True, "mlp_bias": True, "activation": "gelu"},
        "one_key_head": {"num_key_value_heads": 1, "head_dim": 10, "rope_max_wavelength": 300.0},
        "linear": {"rope_scaling": LINEAR, "tie_word_embeddings": True},
        "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_sequence_length": 4},
        "yarn": {"rope_scaling": YARN, "head_dim": 10, "layer_norm_epsilon": 0.1},
        "longrope": {"rope_scaling": LONGROPE, "head_dim": 10, "max_sequence_length": 24},
        "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    }

    @pytest.mark.parametrize("name", CASES)
    def test_hidden_states(self, name):
        backbone, weights = build(**SMALL | self.CASES[name])
        token_ids = ids(len(PADDING), 9)
        expected = oracle.hidden_states(weights, backbone.get_config(), token_ids, PADDING)
        assert oracle.relative_error(run(backbone, token_ids, PADDING), expected, PADDING) < 2e-5
        changed = backbone.get_config() | {"rope_max_wavelength": 50.0}
        assert oracle.relative_error(oracle.hidden_states(weights, changed, token_ids, PADDING), expected) > 1e-2

    @pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.02), ("mixed_bfloat16", 0.1)])
    def test_half_precision(self, dtype, tolerance):
        backbone, weights = build(**SMALL, dtype=dtype, rope_scaling=YARN)
        token_ids = ids(len(PADDING), 9)
        expected = oracle.hidden_states(weights, backbone.get_config(), token_ids, PADDING)
        assert oracle.relative_error(run(backbone, token_ids, PADDING), expected, PADDING) < tolerance


@pytest.mark.parametrize("call", [run, predict])
class TestPadding:
    def test_left_right_and_no_padding_agree(self, backbone, call):
        """N7."""
        tokens = ids(6)
        starts = {"right": 0, "left": 3, "both": 1}
        token_ids, mask = ids(3, 9, seed=1), np.zeros((3, 9), "int32")
        for row, start in enumerate(starts.values()):
            token_ids[row, start : start + 6], mask[row, start : start + 6] = tokens, 1
        alone = run(backbone, tokens[None])[0]
        padded = call(backbone, token_ids, mask)
        for row, (side, start) in enumerate(starts.items()):
            assert oracle.relative_error(padded[row, start : start + 6], alone) < 1e-5, side

    @pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "float32"])
    def test_dtype_of_the_mask(self, backbone, call, dtype):
        token_ids = ids(len(PADDING), 9)
        np.testing.assert_array_equal(
            call(backbone, token_ids, PADDING.astype(dtype)), call(backbone, token_ids, PADDING.astype("int32"))
        )

    def test_mask_of_ones_is_no_mask(self, backbone, call):
        token_ids = ids(2, 9)
        assert (
            oracle.relative_error(call(backbone, token_ids, np.ones((2, 9), "int32")), run(backbone, token_ids)) < 1e-6
        )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_fully_masked_row(self, call, dtype):
        """N8: finite, and the other rows are what they are without it."""
        backbone, _ = build(**SMALL, dtype=dtype)
        token_ids, mask = ids(2, 9), PADDING[[2, 2]].astype("int32")
        mask[1] = 0
        states = call(backbone, token_ids, mask).astype("float32")
        assert np.isfinite(states).all()
        one = call(backbone, token_ids[:1], mask[:1]).astype("float32")
        assert oracle.relative_error(states[:1], one, mask[:1]) < {"float32": 1e-5}.get(dtype, 0.05)


def test_a_step_of_training_with_a_fully_masked_row():
    """The gradients stay finite, and reach every weight but the head, which no hidden state depends on."""
    backbone, before = build(**SMALL, attention_bias=True, mlp_bias=True)
    backbone.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    mask = PADDING.astype("int32").copy()
    mask[0] = 0
    backbone.train_on_batch({"token_ids": ids(5, 9), "padding_mask": mask}, np.zeros((5, 9, SMALL["hidden_dim"])))
    for weight in backbone.weights:
        after = ops.convert_to_numpy(weight)
        assert np.isfinite(after).all(), weight.path
        is_moved = not np.array_equal(after, before[weight.path])
        assert is_moved == ("reverse" not in weight.path), weight.path


class TestProgram:
    """What the forward pass computes, and how often."""

    @pytest.fixture
    def recorded(self, monkeypatch):
        """Counts rotary tables and lists the masks that attention is given."""
        calls = collections.defaultdict(list)

        def record(module, name, what):
            function = getattr(module, name)

            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                calls[name].append(what(*args, **kwargs))
                return function(*args, **kwargs)

            monkeypatch.setattr(module, name, wrapper)

        record(rotary_layer, "rotary_tables", lambda positions, *_: tuple(positions.shape))
        record(
            attention_layer,
            "scaled_dot_product",
            lambda query, key, value, mask=None, is_causal=False, dropout=None: (mask, is_causal, tuple(key.shape)),
        )
        return calls

    def test_one_rotary_table_a_forward_pass(self, backbone, recorded):
        """KH-A5."""
        run(backbone, ids(2, 9), PADDING[:2])
        assert recorded["rotary_tables"] == [(9,)]

    @pytest.mark.parametrize("rows", [None, [0, 1]], ids=["no_padding", "right_padding"])
    def test_causal_flag_alone_where_it_says_it_all(self, backbone, recorded, rows):
        """KH-A2: with a mask, kernels such as PyTorch's flash attention are out of reach."""
        run(backbone, ids(2, 9), None if rows is None else PADDING[rows])
        assert recorded["scaled_dot_product"] == [(None, True, (2, 9, 2, 10))] * 2

    def test_one_mask_for_all_layers(self, backbone, recorded):
        """KH-A1, KH-A4: and keys that are not repeated."""
        run(backbone, ids(2, 9), PADDING[2:4])
        (first, *_), (second, *_) = recorded["scaled_dot_product"]
        assert first is second
        np.testing.assert_array_equal(ops.convert_to_numpy(first)[:, 0], oracle.allowed_keys(9, 9, PADDING[2:4]))
        assert {shape for *_, shape in recorded["scaled_dot_product"]} == {(2, 9, 2, 10)}


@pytest.mark.backend_independent
class TestJaxProgram:
    """The program that JAX is given, equation by equation."""

    B, T = 2, 7

    def equations(self, num_layers, padding_mask=None):
        """(primitive, shape, dtype) of everything the program computes."""
        import jax

        backbone, _ = build(**SMALL | {"num_layers": num_layers}, head_dim=10)

        def forward(trainable, padding_mask):
            inputs = {"token_ids": ids(self.B, self.T), "padding_mask": padding_mask}
            return backbone.stateless_call(trainable, [], inputs)[0]

        assert not backbone.non_trainable_variables
        program = jax.make_jaxpr(forward)([v.value for v in backbone.trainable_variables], padding_mask)
        return list(self.walk(program.jaxpr))

    def walk(self, program):
        for equation in program.eqns:
            for value in equation.outvars:
                yield equation.primitive.name, tuple(value.aval.shape), str(value.aval.dtype)
            for parameter in equation.params.values():
                for inner in parameter if isinstance(parameter, list | tuple) else [parameter]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from self.walk(inner)

    def comparisons(self, equations):
        """How many times positions are compared with positions, which is how a mask comes to be."""
        return sum(
            name in ("lt", "le", "eq", "ne", "ge", "gt") and shape[-2:] == (self.T, self.T)
            for name, shape, _ in equations
        )

    def test_without_padding_only_attention_itself_masks(self):
        """One comparison inside each `jax.nn.dot_product_attention`, none of kllama's."""
        assert [self.comparisons(self.equations(num_layers)) for num_layers in (1, 3)] == [1, 3]

    def test_with_padding_the_mask_is_built_once(self):
        mask = PADDING[:2, : self.T].astype("int32")
        assert [self.comparisons(self.equations(num_layers, mask)) for num_layers in (1, 3)] == [2, 2]

    def test_one_rotary_table(self):
        names = [name for name, *_ in self.equations(3)]
        assert (names.count("cos"), names.count("sin")) == (1, 1)

    @pytest.mark.parametrize("padding_mask", [None, PADDING[:2, :7].astype("int32")], ids=["causal", "padding"])
    def test_keys_are_not_repeated_to_the_query_heads(self, padding_mask):
        """KH-A4: of arrays with B S N H elements there are the query (projected, rotated) and the context."""
        size = self.B * self.T * SMALL["num_query_heads"] * 10
        layout = ("reshape", "transpose", "jit", "pjit", "custom_jvp_call")
        large = [name for name, shape, _ in self.equations(2, padding_mask) if math.prod(shape) == size]
        assert collections.Counter(name for name in large if name not in layout) == {"dot_general": 4, "concatenate": 2}


if keras.backend.backend() == "torch":

    @pytest.mark.parametrize("padding", [False, True])
    def test_torch_compile_takes_it_in_one_graph(backbone, padding):
        import torch

        token_ids, mask = torch.tensor(ids(2, 9)), torch.tensor(PADDING[2:4], dtype=torch.int32) if padding else None
        expected = run(backbone, token_ids, mask)
        compiled = torch.compile(
            lambda token_ids, mask: backbone({"token_ids": token_ids, "padding_mask": mask}),
            backend="eager",
            fullgraph=True,
        )
        assert oracle.relative_error(compiled(token_ids, mask).detach().numpy(), expected) < 1e-6
