"""New tokens at the end of the vocabulary: the model grows with the tokenizer."""

import keras
import numpy as np
import pytest
from keras import ops

import kllama

IDS = np.array([[1, 5, 3, 9], [2, 2, 7, 0]], "int32")


def inputs(token_ids):
    return {"token_ids": token_ids, "padding_mask": None}


def make_model(tied=False, dtype="float32"):
    keras.utils.set_random_seed(3)
    backbone = kllama.LlamaBackbone(10, 1, 2, 8, 12, 1, tie_word_embeddings=tied, initializer_range=0.5, dtype=dtype)
    return kllama.LlamaCausalLM(backbone)


def tables(model):
    embedding = model.backbone.token_embedding
    head = embedding.embeddings if embedding.tie_weights else ops.transpose(embedding.reverse_embeddings)
    return [ops.convert_to_numpy(ops.cast(table, "float32")) for table in (embedding.embeddings, head)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_the_mean_and_the_old_stay(tied, dtype):
    model = make_model(tied, dtype)
    before, logits = tables(model), ops.convert_to_numpy(model(inputs(IDS)))
    paths = [weight.path for weight in model.weights]
    model.resize_vocabulary(13)
    for old, new in zip(before, tables(model), strict=True):
        assert new.shape == (13, 8)
        np.testing.assert_array_equal(new[:10], old)
        mean = old.mean(0, dtype="float64")
        np.testing.assert_allclose(new[10:], np.tile(mean, (3, 1)), atol=1e-6 if dtype == "float32" else 5e-3)
    # Kernels may split a wider head otherwise, so the last bit is not theirs to keep.
    np.testing.assert_allclose(ops.convert_to_numpy(model(inputs(IDS)))[..., :10], logits, atol=1e-5)
    assert [weight.path for weight in model.weights] == paths
    assert {str(weight.dtype) for weight in model.backbone.token_embedding.weights} == {dtype}


def test_the_model_says_its_new_size():
    model = make_model()
    model.resize_vocabulary(13)
    assert model.output_shape == (None, None, 13)
    spec = {name: keras.KerasTensor((2, 4), "int32") for name in ("token_ids", "padding_mask")}
    assert model.compute_output_spec(spec).shape == (2, 4, 13)
    assert model.get_config()["backbone"]["config"]["vocabulary_size"] == 13
    assert model.backbone.token_embedding.get_config()["input_dim"] == 13
    assert model(inputs(np.array([[12]]))).shape == (1, 1, 13)


@pytest.mark.parametrize("tied", [True, False])
def test_training_goes_on_and_reaches_the_new_rows(tied):
    model = make_model(tied)
    model.compile(optimizer=keras.optimizers.Adam(0.1))
    model.fit(IDS, verbose=0)
    model.resize_vocabulary(13)
    before = tables(model)
    ids = np.array([[10, 11, 12, 10, 11, 12]], "int32")
    losses = model.fit(ids, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2
    assert all(np.abs(new[10:] - old[10:]).min() > 0 for old, new in zip(before, tables(model), strict=True))
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1)


def test_generation_sees_the_new_tokens():
    model = make_model()
    prompt = {"token_ids": IDS[:1]}
    model.generate(prompt, max_new_tokens=3, temperature=0)
    model.resize_vocabulary(13)
    head = model.backbone.token_embedding.reverse_embeddings
    bias = np.zeros(head.shape, "float32")
    hidden = ops.convert_to_numpy(model.backbone(inputs(IDS[:1])))[0, -1]
    bias[:, 12] = 100 * hidden
    head.assign(bias)
    assert model.generate(prompt, max_new_tokens=1, temperature=0, stop_token_ids=None)["token_ids"][0, 4] == 12


@pytest.mark.parametrize("tied", [True, False])
def test_a_preset_and_a_keras_file_keep_the_new_rows(tmp_path, tied):
    model = make_model(tied)
    model.resize_vocabulary(13)
    logits = ops.convert_to_numpy(model(inputs(IDS)))
    model.save_to_preset(tmp_path / "preset")
    model.save(tmp_path / "model.keras")
    for loaded in (
        kllama.LlamaCausalLM.from_preset(tmp_path / "preset"),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(loaded(inputs(IDS))), logits)


def test_the_same_size_changes_nothing():
    model = make_model()
    variables = list(map(id, model.weights))
    model.resize_vocabulary(10)
    assert list(map(id, model.weights)) == variables


@pytest.mark.parametrize("size, error", [(9, ValueError), (0, ValueError), (12.0, TypeError), (True, TypeError)])
def test_bad_sizes(size, error):
    with pytest.raises(error, match="vocabulary_size"):
        make_model().resize_vocabulary(size)


def test_an_adapted_embedding_is_refused():
    model = make_model()
    model.backbone.token_embedding.enable_lora(2)
    with pytest.raises(ValueError, match="token_embedding"):
        model.resize_vocabulary(13)
