"""Compiled steps and optimizers when a model's variables are replaced: by LoRA, by quantisation, by new tokens."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import kllama


def draw_lora(backbone):
    """Give LoRA's matrices values, which are zero at first."""
    generator = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(generator.normal(0, 0.3, variable.shape))


def with_lora(model):
    model.backbone.enable_lora(2)
    draw_lora(model.backbone)


def with_int8(model):
    model.backbone.quantize("int8")


def test_generating_keeps_no_kernel_alive(random_model, token_ids):
    model = random_model()
    model.generate({"token_ids": token_ids}, max_new_tokens=2, temperature=0)
    kernel = model.backbone.transformer_layers[0].self_attention.query._kernel
    value, kernel = weakref.ref(kernel.value), weakref.ref(kernel)
    with_int8(model)
    gc.collect()
    assert kernel() is None
    if keras.config.backend() != "torch":  # where Keras' own `Model` keeps the parameter of what its backbone replaced
        assert value() is None
    model.generate({"token_ids": token_ids}, max_new_tokens=2, temperature=0)


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_stream_goes_on_after_its_model_has_got_other_variables(random_model, token_ids, num_before):
    model = random_model()
    stream = model.stream({"token_ids": token_ids[:1]}, max_new_tokens=9, temperature=0, stop_token_ids=None)
    before = [next(stream) for _ in range(num_before)]
    with_int8(model)
    gc.collect()
    assert len([*before, *stream]) == 9


@pytest.mark.parametrize("change", [with_lora, with_int8])
def test_predict_and_evaluate_are_never_stale(random_model, token_ids, change):
    model = random_model()
    other = kllama.LlamaCausalLM(model.backbone)  # which shares the backbone
    for one in (model, other):
        one.predict(token_ids, verbose=0)
        one.evaluate(token_ids, verbose=0)
    change(model)
    expected = ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}))
    fresh = kllama.LlamaCausalLM(model.backbone).evaluate(token_ids, verbose=0)
    for one in (model, other):
        np.testing.assert_allclose(one.predict(token_ids, verbose=0), expected, atol=1e-4)
        np.testing.assert_allclose(one.evaluate(token_ids, verbose=0), fresh, rtol=1e-4)


def test_the_backbones_own_predict_is_not_stale(random_model, token_ids):
    backbone = random_model().backbone
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    before = backbone.predict(inputs, verbose=0)
    backbone.enable_lora(2)
    draw_lora(backbone)
    after = backbone.predict(inputs, verbose=0)
    np.testing.assert_allclose(after, ops.convert_to_numpy(backbone(inputs)), atol=1e-4)
    assert np.abs(after - before).max() > 1e-2


def test_variables_that_the_optimizer_does_not_know(random_model, token_ids):
    model = random_model()
    model.fit(token_ids, verbose=0)
    model.backbone.enable_lora(2)
    kernel = model.backbone.get_layer("transformer_layer_0").self_attention.query._kernel
    before = ops.convert_to_numpy(kernel).copy()
    with pytest.raises(ValueError, match="query/lora_kernel_a.* Call compile\\(\\) after enable_lora"):
        model.fit(token_ids, verbose=0)
    model.compile()
    model.fit(token_ids, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel), before)
    assert any(ops.any(v != 0) for v in model.trainable_variables if v.path.endswith("lora_kernel_b"))


class TestEnableLora:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ((0,), ValueError, "rank (0) must be at least 1"),
            ((1.5,), TypeError, "rank (1.5)"),
            ((2, ["querry"]), ValueError, "['querry']; expected some of attention_output, feedforward_gate_dense,"),
            ((2, ["querry"]), ValueError, "Did you mean 'query'?"),
            ((2, []), ValueError, "target_layer_names = []"),
        ],
    )
    def test_wrong_arguments_change_nothing(self, random_model, arguments, error, words):
        # KH-L1
        backbone = random_model().backbone
        with pytest.raises(error) as caught:
            backbone.enable_lora(*arguments)
        assert words in str(caught.value)
        assert len(backbone.trainable_variables) == len(backbone.variables)

    def test_twice(self, random_model):
        backbone = random_model().backbone
        backbone.enable_lora(2)
        with pytest.raises(ValueError, match="have LoRA already"):
            backbone.enable_lora(2, ["query"])

    def test_float8(self, random_model):
        model = random_model()
        model.quantize("float8")
        with pytest.raises(ValueError, match="quantised to float8"):
            model.backbone.enable_lora(2)

    @pytest.mark.parametrize("targets", [None, ["query", "value"], ["token_embedding", "feedforward_output_dense"]])
    def test_which_train(self, random_model, targets):
        backbone = random_model().backbone
        backbone.enable_lora(2, targets)
        names = {variable.path.split("/")[-2] for variable in backbone.trainable_variables}
        assert names == set(targets or ["query", "value"])
