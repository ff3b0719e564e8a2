"""Quantising a model's kernels, and the dtype policies that a quantised model's config states.

Which layers are quantised, what else then has to change in the model, and how its config says it. The arithmetic is
the layers': Keras' `EinsumDense` and `kllama.layers.token_embedding`. Called by the two model classes.
"""

import contextlib
import gc
import re
from collections.abc import Callable

import keras
from keras.dtype_policies import DTypePolicyMap
from keras.quantizers import AbsMaxQuantizer

from kllama.layers.token_embedding import TokenEmbedding
from kllama.training.optimizers import renewed

_MODES = ("int8", "int4", "float8")
# How a layer that is built with a quantised policy treats its inputs: int4 leaves them as they are.
_USUAL_ACTIVATIONS = {"int8": (AbsMaxQuantizer, (-127, 127), keras.backend.epsilon()), "int4": None}

Filters = str | list[str] | tuple[str, ...] | Callable[[keras.layers.Layer], bool]


def quantize_model(
    model: keras.Model, mode: str | None, config=None, filters: Filters | None = None, type_check: bool = True
) -> None:
    """Quantise the projections of a model, its embedding table and its head, in place.

    A compiled model stays compiled; its optimizer starts anew if it has trained, because its state is the old kernels'.
    A wrong argument changes nothing. Python's garbage collector is frozen meanwhile, in all threads.

    Args:
        model: the model.
        mode: `"int8"`, `"int4"` or `"float8"`. float8 leaves the embedding table and the head as they are.
        config: a `keras.quantizers.QuantizationConfig` of that mode, or None for Keras' default one.
        filters: which layers: a regular expression or several, searched for in the layer's name, or a function of the
            layer. None means all.
        type_check: whether subclasses of the layers are refused, as Keras has it.

    Raises:
        TypeError: for `filters` of another type.
        ValueError: for another mode, for layers that are quantised already, compute in float16 (int8 alone) or have
            LoRA (float8 alone), where no layer is left to quantise, and for a `weight_quantizer` in the config.
    """
    mode = mode if config is None else config.mode
    if mode not in _MODES:
        raise ValueError(f"mode = {mode!r}; expected one of {_MODES}. gptq and awq are not implemented for a Llama.")
    if config is not None and config.weight_quantizer is not None:
        raise ValueError(
            f"config.weight_quantizer = {config.weight_quantizer!r}; expected None. It would scale every kernel along "
            "the same axis, and the kernels of a Llama differ in what their axes are."
        )
    layers = [layer for layer in quantizable_layers(model, mode) if _matches(layer, filters)]
    _check_layers(layers, mode, filters)
    try:
        with _cheap_collections():
            for layer in layers:
                layer.quantize(mode, type_check=type_check, config=config)
                if mode == "float8":
                    _order_variables(layer)
    finally:
        _forget_old_variables(model, mode)


def quantizable_layers(model: keras.Model, mode: str) -> list[keras.layers.Layer]:
    """List the layers of a model that have a kernel to quantise in a mode."""
    kinds = keras.layers.EinsumDense if mode == "float8" else (keras.layers.EinsumDense, TokenEmbedding)
    return [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]


def serialize_dtypes(backbone: keras.Model) -> dict:
    """Give the `dtype` of a backbone's config: its policy, with those of its layers by path where they are others.

    The default policy is named, so that the same model comes back under any global policy.
    """
    default = backbone.dtype_policy
    default = default.default_policy if isinstance(default, DTypePolicyMap) else default
    policies = {}
    for layer in backbone._flatten_layers(include_self=False):
        if layer.dtype_policy != default and not isinstance(layer, keras.layers.InputLayer):
            _check_activations(layer)
            policies[layer.path] = layer.dtype_policy
    return keras.dtype_policies.serialize(DTypePolicyMap(default.name, policies) if policies else default)


def check_preset_mode(model: keras.Model) -> None:
    """Raise a ValueError for a model whose layers are quantised in a way that a preset cannot hold."""
    modes = {layer.quantization_mode for layer in model._flatten_layers()} - {None, "int8"}
    if modes:
        raise ValueError(
            f"the model is quantised to {', '.join(sorted(modes))}; expected int8 or none in a preset. Save it with "
            "save('model.keras')."
        )


def settle_policies(backbone: keras.Model) -> None:
    """Give each layer of a backbone that was built with a map of dtype policies its own one, instead of the map.

    Keras writes into the map, which other layers share, derives the names of policies from the map's own, and cannot
    save the layers that have it.
    """
    for layer in backbone._flatten_layers(include_self=False):
        if isinstance(layer.dtype_policy, DTypePolicyMap):
            policies = layer.dtype_policy
            layer._dtype_policy = policies.default_policy if layer.path is None else policies[layer.path]


def _matches(layer, filters) -> bool:
    """Decide whether `filters` choose a layer, as `keras.Model.quantize` does."""
    if filters is None:
        return True
    if isinstance(filters, str | list | tuple):
        patterns = [filters] if isinstance(filters, str) else filters
        return any(re.search(pattern, layer.name) for pattern in patterns)
    if not callable(filters):
        raise TypeError(f"filters ({filters!r}) must be a regular expression, a list of them or a function of a layer.")
    return bool(filters(layer))


def _check_layers(layers, mode, filters):
    if not layers:
        raise ValueError(f"filters = {filters!r}; expected some that match a layer which mode {mode!r} quantises.")
    quantised = [layer.path for layer in layers if layer.quantization_mode is not None]
    if quantised:
        raise ValueError(f"mode = {mode!r}; expected layers that are not quantised. {quantised[:3]} are already.")
    adapted = [layer.path for layer in layers if layer.lora_enabled]
    if mode == "float8" and adapted:
        raise ValueError(f"mode = 'float8'; expected layers without LoRA. {adapted[:3]} have it enabled.")
    narrow = [layer.path for layer in layers if layer.compute_dtype == "float16"]
    if mode == "int8" and narrow:
        raise ValueError(
            f"{narrow[:3]}: compute dtype = 'float16', which cannot hold the sums of int8 products; expected another. "
            'Build the model with dtype="bfloat16" or "mixed_bfloat16".'
        )


def _check_activations(layer):
    """Raise a ValueError for a layer whose activations are quantised in a way that no dtype policy states."""
    if layer.quantization_mode not in _USUAL_ACTIVATIONS:
        return
    quantizer, usual = layer.inputs_quantizer, _USUAL_ACTIVATIONS[layer.quantization_mode]
    state = None if quantizer is None else (type(quantizer), quantizer.value_range, quantizer.epsilon)
    if state != usual:
        raise ValueError(
            f"{layer.path}: activation_quantizer = {quantizer!r}; expected that of mode {layer.quantization_mode!r}, "
            "because a model's config does not say which another one is. Use save_weights to keep this model."
        )


@contextlib.contextmanager
def _cheap_collections():
    """Let Python's collector look at new objects only: Keras runs it for each kernel, up to a second each time."""
    is_frozen = gc.get_freeze_count() > 0  # by someone else, whose objects stay as they are
    if not is_frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not is_frozen:
            gc.unfreeze()


def _order_variables(layer):
    """Put the kernel and the bias behind the scales of float8, where a layer that is built quantised has them.

    The lists of `get_weights` and `set_weights` have this order; the other modes come out right by themselves.
    """
    layer._tracker.unlock()
    for variable in (layer._kernel, layer.bias):
        if variable is not None:
            layer._untrack_variable(variable)
            layer._track_variable(variable)
    layer._tracker.lock()


def _forget_old_variables(model, mode):
    """Drop what holds the float kernels: compiled functions, and the state of an optimizer that has trained."""
    model.train_function = model.test_function = model.predict_function = None
    model._post_quantize(mode)
    if model.compiled and model.optimizer is not None and model.optimizer.built:
        old, model.optimizer = model.optimizer, renewed(model.optimizer)
        compiled_with = model._compile_config.config
        if compiled_with["optimizer"] is old:
            compiled_with["optimizer"] = model.optimizer
