"""What `enable_lora` of a backbone is asked for, checked before anything changes."""

import difflib

import keras


def check_lora_targets(backbone: keras.Model, names: list[str]) -> None:
    """Raise a ValueError for names that no layer has, and for layers that cannot get low-rank matrices.

    Args:
        backbone: a `LlamaBackbone`.
        names: of its layers.
    """
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if _can_adapt(layer)]
    known = sorted({layer.name for layer in layers})
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        near = difflib.get_close_matches(unknown[0], known, n=1) if unknown else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"target_layer_names = {names!r}; expected some of {', '.join(known)}.{hint}")
    targets = [layer for layer in layers if layer.name in names]
    adapted = [layer.path for layer in targets if layer.lora_enabled]
    if adapted:
        raise ValueError(f"{adapted[:3]} have LoRA already; expected layers without. It can be enabled once.")
    float8 = [layer.path for layer in targets if layer.quantization_mode == "float8"]
    if float8:
        raise ValueError(f"{float8[:3]} are quantised to float8, which knows no LoRA; expected int8, int4 or none.")


def _can_adapt(layer) -> bool:
    return isinstance(layer, keras.layers.EinsumDense | keras.layers.Embedding)
