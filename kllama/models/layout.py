"""How the weights of a Llama are spread over a mesh of devices: the layout of Megatron-LM.

Every pair of products is split so that the first gives each device its own columns, heads or units of the feed-forward
network, and the second takes them as its rows. Between the two no device needs what another one has; after each pair
one sum over the devices makes the result whole. So a decoder layer has two sums, one after the attention output and one
after the feed-forward output.

It only says what is split along which axis of the mesh; Keras and the framework do the rest. Called by
`LlamaBackbone.get_layout_map`.

Reference: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053), section 3.
"""

import keras

from kllama.arguments import check_integer
from kllama.errors import UnsupportedError


def megatron_layout(
    device_mesh: keras.distribution.DeviceMesh, model: str, data: str, num_key_value_heads: int | None
) -> keras.distribution.LayoutMap:
    """Give the layout of each weight that is split; Keras keeps a whole copy of every other one on each device.

    Args:
        device_mesh: the devices.
        model: the axis of the mesh that the weights are split along.
        data: the axis of the mesh that batches are split along, and with them the hidden axis of the kernels.
        num_key_value_heads: K, or None for any multiple of the size of the `model` axis.

    Raises:
        UnsupportedError: on a backend other than JAX.
        TypeError: if `num_key_value_heads` is not an integer.
        ValueError: if `device_mesh` is no mesh or has no such axes, or `num_key_value_heads` is not positive.
    """
    _check_backend()
    _check_mesh(device_mesh, model=model, data=data)
    if num_key_value_heads is not None:
        check_integer("num_key_value_heads", num_key_value_heads, minimum=1)
    num_parts = device_mesh.shape[list(device_mesh.axis_names).index(model)]
    is_divisible = num_key_value_heads is None or num_key_value_heads % num_parts == 0
    layout_map = keras.distribution.LayoutMap(device_mesh)
    layout_map.update(_embedding_axes(model, data))
    for name, axes in _layer_axes(model, data, groups=model if is_divisible else None).items():
        layout_map[rf"transformer_layer_\d+/{name}"] = axes
    return layout_map


def _embedding_axes(model: str, data: str) -> dict[str, tuple]:
    return {
        "token_embedding/embeddings": (model, data),  # (V, D)
        "token_embedding/reverse_embeddings": (data, model),  # (D, V)
        "token_embedding/lora_embeddings_a": (model, None),  # (V, R)
        "token_embedding/lora_embeddings_b": (None, data),  # (R, D)
    }


def _layer_axes(model: str, data: str, groups: str | None) -> dict[str, tuple]:
    """Give the axes of a decoder layer's weights by path; `groups` is where the key/value heads go."""
    # LoRA's matrices have the shapes of `keras.layers.EinsumDense`. What quantisation adds is not here: its shapes
    # differ between the modes, and it is small.
    return {
        "self_attention/query/kernel": (data, model, None),  # (D, N, H)
        "self_attention/query/bias": (model, None),  # (N, H)
        "self_attention/query/lora_kernel_a": (data, model, None),  # (D, N, R)
        "self_attention/(key|value)/kernel": (data, groups, None),  # (D, K, H)
        "self_attention/(key|value)/bias": (groups, None),  # (K, H)
        "self_attention/(key|value)/lora_kernel_a": (data, groups, None),  # (D, K, R)
        "self_attention/attention_output/kernel": (model, None, data),  # (N, H, D)
        "self_attention/attention_output/lora_kernel_a": (model, None, None),  # (N, H, R)
        "self_attention/attention_output/lora_kernel_b": (None, data),  # (R, D)
        "feedforward_(gate|intermediate)_dense/kernel": (data, model),  # (D, F)
        "feedforward_(gate|intermediate)_dense/bias": (model,),  # (F,)
        "feedforward_(gate|intermediate)_dense/lora_kernel_a": (data, None),  # (D, R)
        "feedforward_(gate|intermediate)_dense/lora_kernel_b": (None, model),  # (R, F)
        "feedforward_output_dense/kernel": (model, data),  # (F, D)
        "feedforward_output_dense/lora_kernel_a": (model, None),  # (F, R)
        "feedforward_output_dense/lora_kernel_b": (None, data),  # (R, D)
    }


def _check_backend() -> None:
    # With the other backends a `ModelParallel` scope changes nothing, and Keras does not say so.
    if keras.config.backend() != "jax":
        raise UnsupportedError(
            f"get_layout_map: the Keras backend = {keras.config.backend()!r}; expected 'jax', the only one on which "
            "Keras distributes weights. Set KERAS_BACKEND=jax, or leave the layout map out."
        )


def _check_mesh(device_mesh, **axes: str) -> None:
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            f"device_mesh = {device_mesh!r} of type {type(device_mesh).__name__}; expected a "
            "keras.distribution.DeviceMesh."
        )
    for name, axis in axes.items():
        if axis not in device_mesh.axis_names:
            raise ValueError(
                f"{name}_parallel_dim_name = {axis!r}; expected one of the mesh's axes {list(device_mesh.axis_names)}."
            )
