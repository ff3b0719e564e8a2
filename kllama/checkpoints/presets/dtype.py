"""The `dtype` of a preset: the name of a dtype policy, or a map that says which layers are quantised to int8.

Reads the serialized form that Keras writes, without its deserializer. Building a policy from it is for `models/`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from kllama.checkpoints.files.reader import shown
from kllama.checkpoints.presets.fields import POLICIES
from kllama.errors import CheckpointError, UnsupportedError

INT8 = "int8"
"""What stands for the policy of a quantised layer, whatever its floats are."""

# Keras takes a key of a map for a regular expression where no layer has the path, and tries each for each layer. So
# only paths of layers are read, and only those of kllama's layers are kept.
_INDEX = re.compile(r"transformer_layer_(0|[1-9]\d{0,8})(?:/(.+))?", re.ASCII)
_EMBEDDING = "token_embedding"
_OTHERS = ("rotary_embedding", "causal_mask", "sliding_mask", "sequence_output_layernorm")
# Within a transformer layer: parts that have a kernel to quantise, and parts that have none.
_KERNELS = (
    *(f"self_attention/{name}" for name in ("query", "key", "value", "attention_output")),
    *(f"feedforward_{name}_dense" for name in ("gate", "intermediate", "output")),
)
_PARTS = (
    None,  # the layer itself
    "self_attention",
    "self_attention_layernorm",
    "self_attention_dropout",
    "self_attention/probability_dropout",
    "self_attention/query_norm",
    "self_attention/key_norm",
    "feedforward_layernorm",
)
# Those of KerasHub's classes, which have no variables, some with a name that Keras made up.
_KERAS_HUB_PART = re.compile(r"(self_attention/)?(\w+_)?(dropout|softmax|rotary_embedding)(_\d+)?", re.ASCII)
_MOST_PER_LAYER, _MOST_BESIDE = 32, 16


class LayerDtypes(NamedTuple):
    """The dtype policy of a model, some of whose layers are quantised or have one of their own.

    Attributes:
        default: the name of a policy that is not quantised; or None, for the dtype of the stored floats.
        layers: by the path of a layer the name of its policy, or `INT8`.
    """

    default: str | None
    layers: dict[str, str]

    def or_default(self, default: str, path: Path) -> "LayerDtypes | str":
        """Fill a default in where there is none; where all layers have the same policy, give its name alone.

        Args:
            default: the dtype of the stored floats.
            path: the preset, for messages.

        Raises:
            UnsupportedError: int8 layers in a model of float16, which cannot hold the sums of int8 products.
        """
        default = self.default or default
        if INT8 in self.layers.values() and default in ("float16", "mixed_float16"):
            raise UnsupportedError(f"{path}: dtype = {shown(default)}; expected another beside layers of int8.")
        return self._replace(default=default) if self.layers else default

    def quantizes(self, layer: str) -> bool:
        """Tell whether a layer that has a kernel is quantised."""
        return self.layers.get(layer) == INT8


def read_layer_dtypes(path: Path, dtype: object, num_layers: int) -> LayerDtypes:
    """Read the `dtype` of a backbone's config.

    Args:
        path: the file, for messages.
        dtype: the serialized policy or map; older presets wrote a bare name.
        num_layers: how many transformer layers the model has.

    Raises:
        UnsupportedError: a policy or a way to quantise that kllama does not read.
        CheckpointError: a map with a key that is not the path of a layer of this model, or with too many.
    """
    match dtype:
        case {"class_name": "DTypePolicyMap", "config": {"default_policy": default, "policy_map": dict(policies)}}:
            default = None if default is None else read_policy(path, "dtype", default, POLICIES)
        case _:
            default, policies = read_policy(path, "dtype", dtype, POLICIES), {}
    most = _MOST_PER_LAYER * num_layers + _MOST_BESIDE
    if len(policies) > most:
        raise CheckpointError(f"{path}: dtype of {len(policies)} layers; expected at most {most} for this model.")
    kept = {}
    for layer, policy in policies.items():
        allowed = _policies_of(layer, num_layers)
        if allowed is None:
            raise CheckpointError(
                f"{path}: dtype of {shown(layer)} = {shown(policy)}; expected the path of a layer of this model, which "
                f"has {num_layers} transformer layers."
            )
        name = _read_layer(path, layer, policy, default)
        if name in allowed and name != default:
            kept[layer] = name
    return LayerDtypes(default, kept)


def _policies_of(layer: str, num_layers: int) -> tuple[str, ...] | None:
    """List the policies that mean something for a layer; None where the model has no such layer.

    Keras lists every layer that was built with a quantised policy, also those with nothing to quantise.
    """
    if layer == _EMBEDDING:
        return (*POLICIES, INT8)
    if layer in _OTHERS:
        return POLICIES
    found = _INDEX.fullmatch(layer)
    if not found or int(found[1]) >= num_layers:
        return None
    if found[2] in _KERNELS:
        return (*POLICIES, INT8)
    if found[2] in _PARTS:
        return POLICIES
    return () if _KERAS_HUB_PART.fullmatch(found[2]) else None


def _read_layer(path: Path, layer: str, policy: object, default: str | None) -> str:
    int8 = INT8 if default is None else f"{INT8}_from_{default}"
    name = read_policy(path, f"dtype of {shown(layer)}", policy, (*POLICIES, int8))
    return INT8 if name == int8 else name


def read_policy(path: Path, field: str, policy: object, allowed: tuple[str, ...]) -> str:
    """Return the name of a serialized policy, such as `mixed_bfloat16` or `int8_from_bfloat16`.

    Raises:
        UnsupportedError: it is none of the allowed ones; the message calls it `field`.
    """
    match policy:
        case {"class_name": "DTypePolicy", "config": {"name": name}}:
            policy = name
        case {"config": {"mode": mode, "source_name": None}}:
            policy = mode
        case {"config": {"mode": mode, "source_name": source}}:
            policy = f"{mode}_from_{source}"
    if policy not in allowed:
        raise UnsupportedError(f"{path}: {field} = {shown(policy)}; expected one of {', '.join(allowed)}.")
    return policy
