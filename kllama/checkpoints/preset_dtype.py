"""The `dtype` of a preset: the name of a dtype policy, or a map that says which layers are quantised to int8.

Reads the serialized form that Keras writes, without its deserializer. Building a policy from it is for `models/`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from kllama.checkpoints.preset_fields import POLICIES
from kllama.checkpoints.reader import shown
from kllama.errors import CheckpointError, UnsupportedError

INT8 = "int8"
"""What stands for the policy of a quantised layer, whatever its floats are."""

# The layers that have a kernel to quantise.
_KERNEL = re.compile(r"token_embedding|transformer_layer_\d+/(self_attention/\w+|feedforward_\w+_dense)", re.ASCII)
# Keras takes a key of a map for a regular expression where no layer has the path. These can only be themselves.
_PATH = re.compile(r"\w+(/\w+)*", re.ASCII)


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


def read_layer_dtypes(path: Path, dtype: object) -> LayerDtypes:
    """Read the `dtype` of a backbone's config.

    Args:
        path: the file, for messages.
        dtype: the serialized policy or map; older presets wrote a bare name.

    Raises:
        UnsupportedError: a policy or a way to quantise that kllama does not read.
        CheckpointError: a map with a key that is no path.
    """
    match dtype:
        case {"class_name": "DTypePolicyMap", "config": {"default_policy": default, "policy_map": dict(policies)}}:
            default = None if default is None else read_policy(path, "dtype", default, POLICIES)
        case _:
            default, policies = read_policy(path, "dtype", dtype, POLICIES), {}
    layers = {layer: _read_layer(path, layer, policy, default) for layer, policy in policies.items()}
    # Keras lists every layer that was built with a quantised policy, also those with nothing to quantise.
    return LayerDtypes(default, {k: policy for k, policy in layers.items() if policy != INT8 or _KERNEL.fullmatch(k)})


def _read_layer(path: Path, layer: str, policy: object, default: str | None) -> str:
    if not _PATH.fullmatch(layer):
        raise CheckpointError(f"{path}: dtype of {shown(layer)} = {shown(policy)}; expected the path of a layer.")
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
