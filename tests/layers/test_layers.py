"""The Keras layers: configs, weights, dtype policies, dropout, and caches. Their maths is tested where it lives."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops

from kllama.layers.attention import LlamaAttention
from kllama.layers.causal_mask import CausalMask
from kllama.layers.decoder_layer import LlamaDecoderLayer
from kllama.layers.rms_norm import RMSNorm
from kllama.layers.rotary_embedding import RotaryEmbedding
from kllama.layers.token_embedding import TokenEmbedding
from tests import oracle

D, N, K, H, F, T = 12, 4, 2, 6, 10, 5
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 20.0}

# Every argument of every class, off its default.
CASES = {
    RMSNorm: {"epsilon": 0.05},
    RotaryEmbedding: {"head_dim": H, "max_wavelength": 500.0, "rope_scaling": YARN, "max_sequence_length": 99},
    CausalMask: {"window": 2},
    LlamaAttention: {
        "num_query_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "use_bias": True,
        "use_output_bias": False,
        "qk_norm_epsilon": 0.03,
        "dropout": 0.2,
        "kernel_initializer": keras.initializers.RandomNormal(stddev=0.3),
    },
    LlamaDecoderLayer: {
        "num_query_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "intermediate_dim": F,
        "activation": "gelu",
        "layer_norm_epsilon": 0.05,
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "attention_bias": True,
        "attention_output_bias": False,
        "qk_norm": True,
        "mlp_bias": True,
        "kernel_initializer": keras.initializers.RandomNormal(stddev=0.3),
    },
    TokenEmbedding: {
        "input_dim": 20,
        "output_dim": D,
        "tie_weights": False,
        "embeddings_initializer": keras.initializers.RandomNormal(stddev=0.3),
        "embeddings_regularizer": keras.regularizers.L2(0.1),
        "embeddings_constraint": keras.constraints.MaxNorm(1.5),
        "mask_zero": True,
    },
}
BASE = {"name": "named", "trainable": False, "dtype": "mixed_bfloat16"}


def states(dtype="float32", length=T, batch_size=2, seed=0):
    return ops.convert_to_tensor(np.random.default_rng(seed).normal(size=(batch_size, length, D)), dtype)


def tables(length=T, **kwargs):
    """Cosines and sines of positions 0 to length - 1."""
    return RotaryEmbedding(H, **kwargs)(ops.zeros((1, length), "int32"))


def inputs_of(cls, dtype="float32") -> tuple:
    """What a layer is called on."""
    ids = ops.convert_to_tensor([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6]], "int32")
    if cls in (LlamaAttention, LlamaDecoderLayer):
        return states(dtype), *tables(dtype=dtype)
    return {RMSNorm: (states(dtype),), RotaryEmbedding: (ids,), CausalMask: (ids,), TokenEmbedding: (ids,)}[cls]


def numpy(x) -> list[np.ndarray]:
    return [ops.convert_to_numpy(ops.cast(leaf, "float32")) for leaf in keras.tree.flatten(x)]


def rebuilt(layer):
    """The layer again, from its own config written out as JSON."""
    config = json.loads(json.dumps(keras.layers.serialize(layer)))
    return keras.layers.deserialize(config)


@pytest.fixture
def bfloat16_policy():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
class TestConfig:
    """KH-S2, KH-S3, KH-S4: KerasHub's decoder layer, attention and rotary embedding cannot be rebuilt."""

    def test_the_case_leaves_no_argument_at_its_default(self, cls):
        base = cls.__mro__[1] if cls is TokenEmbedding else cls
        parameters = inspect.signature(base.__init__).parameters
        arguments = {name: p for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"}
        refused = {"reverse_dtype", "logit_soft_cap"} if cls is TokenEmbedding else set()
        assert arguments.keys() - refused == CASES[cls].keys()
        assert not [name for name, value in CASES[cls].items() if value == arguments[name].default]

    def test_config_holds_what_was_given(self, cls):
        config = cls(**CASES[cls], **BASE).get_config()
        for name, value in (CASES[cls] | BASE).items():
            if name == "dtype":
                value = keras.DTypePolicy(value)
            if hasattr(value, "get_config"):
                value = keras.saving.serialize_keras_object(value)
            assert config[name] == value, name

    def test_rebuilds_from_its_config_with_equal_output(self, cls):
        layer = cls(**CASES[cls], **BASE)
        arguments = inputs_of(cls, "bfloat16")
        layer(*arguments)
        oracle.randomize(layer)
        other = rebuilt(layer)
        assert type(other) is cls and other is not layer
        assert keras.layers.serialize(other)["config"] == keras.layers.serialize(layer)["config"]
        other(*arguments)
        assert [(w.path, w.shape) for w in other.weights] == [(w.path, w.shape) for w in layer.weights]
        other.set_weights(layer.get_weights())
        for one, another in zip(numpy(layer(*arguments)), numpy(other(*arguments)), strict=True):
            np.testing.assert_array_equal(one, another)

    def test_symbolic_output_is_what_a_call_gives(self, cls):
        layer = cls(**CASES[cls], dtype="mixed_bfloat16")
        arguments = inputs_of(cls, "bfloat16")
        symbolic = [keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype)) for x in arguments]
        for spec, value in zip(
            keras.tree.flatten(layer(*symbolic)), keras.tree.flatten(layer(*arguments)), strict=True
        ):
            assert (tuple(spec.shape), spec.dtype) == (
                tuple(value.shape),
                keras.backend.standardize_dtype(value.dtype),
            )


def test_config_of_a_layer_does_not_share_what_it_was_given():
    scaling = dict(YARN)
    layer = RotaryEmbedding(H, rope_scaling=scaling)
    scaling["factor"] = 99.0
    assert layer.get_config()["rope_scaling"] == YARN


class TestWeights:
    KERNELS = {
        "self_attention/query/kernel": (D, N, H),
        "self_attention/key/kernel": (D, K, H),
        "self_attention/value/kernel": (D, K, H),
        "self_attention/attention_output/kernel": (N, H, D),
        "feedforward_gate_dense/kernel": (D, F),
        "feedforward_intermediate_dense/kernel": (D, F),
        "feedforward_output_dense/kernel": (F, D),
        "self_attention_layernorm/scale": (D,),
        "feedforward_layernorm/scale": (D,),
    }
    ATTENTION_BIASES = {
        "self_attention/query/bias": (N, H),
        "self_attention/key/bias": (K, H),
        "self_attention/value/bias": (K, H),
        "self_attention/attention_output/bias": (D,),
    }
    MLP_BIASES = {
        "feedforward_gate_dense/bias": (F,),
        "feedforward_intermediate_dense/bias": (F,),
        "feedforward_output_dense/bias": (D,),
    }

    @pytest.mark.parametrize("attention_bias", [False, True])
    @pytest.mark.parametrize("mlp_bias", [False, True])
    def test_paths_and_shapes(self, attention_bias, mlp_bias):
        layer = LlamaDecoderLayer(N, K, H, F, attention_bias=attention_bias, mlp_bias=mlp_bias, name="layer_7")
        layer.build((None, None, D))
        biases = (self.ATTENTION_BIASES if attention_bias else {}) | (self.MLP_BIASES if mlp_bias else {})
        expected = self.KERNELS | biases
        assert {w.path: tuple(w.shape) for w in layer.weights} == {f"layer_7/{k}": v for k, v in expected.items()}
        assert all(weight.trainable for weight in layer.weights)

    def test_initial_values(self):
        layer = LlamaDecoderLayer(
            16, 16, 8, 128, attention_bias=True, kernel_initializer=keras.initializers.RandomNormal(stddev=0.5)
        )
        layer.build((None, None, 128))
        kernels = [w for w in layer.weights if w.path.endswith("kernel")]
        for kernel in kernels:
            assert np.std(ops.convert_to_numpy(kernel)) == pytest.approx(0.5, rel=0.05), kernel.path
        for one, other in zip(kernels, kernels[1:], strict=False):
            assert not np.array_equal(np.ravel(one), np.ravel(other)), "two kernels were drawn alike"
        for weight in layer.weights:
            if not weight.path.endswith("kernel"):
                np.testing.assert_array_equal(ops.convert_to_numpy(weight), float(weight.path.endswith("scale")))

    @pytest.mark.parametrize("argument", [{"reverse_dtype": "float32"}, {"logit_soft_cap": 30.0}])
    def test_token_embedding_refuses_what_it_does_not_do(self, argument):
        with pytest.raises(ValueError, match=f"{next(iter(argument))}.*must be None"):
            TokenEmbedding(20, D, **argument)


class TestPolicies:
    @pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("cls", [cls for cls in CASES if cls is not CausalMask], ids=lambda cls: cls.__name__)
    def test_reaches_every_sublayer(self, cls, policy):
        layer = cls(**CASES[cls], dtype=policy)
        arguments = inputs_of(cls, layer.compute_dtype)
        output = layer(*arguments)
        sublayers = layer._flatten_layers()
        expected = keras.DTypePolicy(policy)
        assert {sublayer.dtype_policy.name for sublayer in sublayers} == {policy}
        assert {w.dtype for w in layer.weights} <= {expected.variable_dtype}
        dtypes = {keras.backend.standardize_dtype(x.dtype) for x in keras.tree.flatten(output)}
        assert dtypes == {expected.compute_dtype}

    @pytest.mark.usefixtures("bfloat16_policy")
    def test_global_policy(self):
        layer = LlamaDecoderLayer(N, K, H, F)
        layer.build((None, None, D))
        assert {sublayer.dtype_policy.name for sublayer in layer._flatten_layers()} == {"bfloat16"}

    @pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float16", "mixed_float16", "float32"])
    @pytest.mark.parametrize("tie_weights", [False, True])
    def test_logits_are_float32(self, policy, tie_weights):
        layer = TokenEmbedding(20, D, tie_weights=tie_weights, dtype=policy)
        layer.build()
        weights = oracle.randomize(layer)
        head = next((w for path, w in weights.items() if "reverse" in path), None)
        head = next(iter(weights.values())).T if head is None else head
        x = states(layer.compute_dtype)
        logits = layer(x, reverse=True)
        assert keras.backend.standardize_dtype(logits.dtype) == "float32"
        spec = layer(keras.KerasTensor(x.shape, layer.compute_dtype), reverse=True)
        assert (spec.dtype, tuple(spec.shape)) == ("float32", (2, T, 20))
        tolerance = {"float32": 1e-6, "float16": 2e-3, "mixed_float16": 2e-3}.get(policy, 2e-2)
        assert oracle.relative_error(numpy(logits)[0], numpy(x)[0].astype("float64") @ head) < tolerance


class TestDropout:
    """KH-A6: KerasHub applies its rate twice, and to the attention output alone."""

    SIZE = 4000

    @pytest.mark.parametrize("rate", [0.1, 0.4])
    def test_dropout_acts_once_on_the_attention_output(self, rate):
        keras.utils.set_random_seed(1)
        layer = LlamaDecoderLayer(N, K, H, F, dropout=rate)
        x, rotary = states(batch_size=self.SIZE // T), tables()
        layer(x, *rotary)
        oracle.randomize(layer)
        down = layer.feedforward_output_dense.kernel
        down.assign(ops.zeros(down.shape))
        (added,) = numpy(layer(x, *rotary) - x)
        (dropped,) = numpy(layer(x, *rotary, training=True) - x)
        kept = dropped != 0
        assert kept.mean() == pytest.approx(1 - rate, abs=0.01)
        np.testing.assert_allclose(dropped[kept], added[kept] / (1 - rate), rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("rate", [0.1, 0.4])
    def test_attention_dropout_acts_on_the_probabilities(self, rate):
        """With a single key each head has one probability, 1: a head is dropped whole or not at all."""
        keras.utils.set_random_seed(1)
        layer = LlamaAttention(N, K, H, dropout=rate)
        x, rotary = ops.ones((self.SIZE, 1, N * H)), tables(1)
        layer(x, *rotary)
        oracle.randomize(layer)
        layer.attention_output.kernel.assign(np.eye(N * H).reshape(N, H, N * H))
        whole, dropped = (
            numpy(layer(x, *rotary, training=training))[0].reshape(self.SIZE, N, H) for training in (False, True)
        )
        kept = (dropped != 0).all(-1)
        assert np.array_equal(kept, (dropped != 0).any(-1))
        assert kept.mean() == pytest.approx(1 - rate, abs=0.01)
        np.testing.assert_allclose(dropped[kept], whole[kept] / (1 - rate), rtol=1e-5)

    def test_attention_dropout_keeps_the_mean(self):
        """Over many draws the average is what comes without dropout, causal mask included."""
        keras.utils.set_random_seed(1)
        layer = LlamaAttention(N, K, H, dropout=0.3)
        row = states(batch_size=1)
        layer(row, *tables())
        oracle.randomize(layer)
        x = ops.repeat(row, 3000, axis=0)
        (dropped,) = numpy(layer(x, *tables(), training=True))
        assert oracle.relative_error(dropped.mean(0), numpy(layer(row, *tables()))[0][0]) < 0.05

    def test_no_dropout_outside_training(self):
        layer = LlamaDecoderLayer(**CASES[LlamaDecoderLayer] | {"dropout": 0.9, "attention_dropout": 0.9})
        x, rotary = states(), tables()
        outputs = [numpy(layer(x, *rotary, training=training))[0] for training in (False, None, False)]
        np.testing.assert_array_equal(outputs[0], outputs[1])
        np.testing.assert_array_equal(outputs[0], outputs[2])
        assert not np.array_equal(numpy(layer(x, *rotary, training=True))[0], outputs[0])


@pytest.mark.parametrize("cls", [LlamaAttention, LlamaDecoderLayer], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_cached_equals_uncached(cls, num_key_value_heads):
    """A prompt of 3 at once, then 2 tokens one by one, in a cache of 7 slots."""
    arguments = CASES[cls] | {"num_key_value_heads": num_key_value_heads}
    layer, mask = cls(**arguments), CausalMask()
    x = states()
    cos, sin = tables()
    (whole,) = numpy(layer(x, cos, sin))
    oracle.randomize(layer)
    (whole,) = numpy(layer(x, cos, sin))
    cache = ops.zeros((2, 2, 7, num_key_value_heads, H))
    pieces = []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        output, cache = layer(
            x[:, start:stop],
            cos[:, start:stop],
            sin[:, start:stop],
            attention_mask=mask.for_cache(ops.zeros((2, stop - start)), 7, start),
            cache=cache,
            cache_update_index=start,
        )
        pieces.append(numpy(output)[0])
    assert oracle.relative_error(np.concatenate(pieces, 1), whole) < 1e-5
    assert tuple(cache.shape) == (2, 2, 7, num_key_value_heads, H)
    written = numpy(cache)[0]
    assert (written[:, :, :5] != 0).all() and (written[:, :, 5:] == 0).all()


@pytest.mark.parametrize("padding", [None, [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]], ids=["causal", "padding"])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_decoder_layer_against_float64(activation, padding):
    layer = LlamaDecoderLayer(
        N,
        K,
        H,
        F,
        activation=activation,
        layer_norm_epsilon=0.1,
        attention_bias=True,
        mlp_bias=True,
        qk_norm=True,
        name="layer",
    )
    x, (cos, sin) = states(), tables()
    mask = None if padding is None else CausalMask(3)(ops.zeros((2, T)), ops.convert_to_tensor(padding, "int32"))
    layer(x, cos, sin, mask)
    weights = oracle.randomize(layer)
    expected = oracle.decoder_layer(
        weights,
        "layer/",
        {"layer_norm_epsilon": 0.1, "activation": activation},
        numpy(x)[0],
        oracle.rope_frequencies(H, 10000),
        oracle.allowed_keys(T, T, padding, window=99 if padding is None else 3),
    )
    assert oracle.relative_error(numpy(layer(x, cos, sin, mask))[0], expected) < 1e-6
