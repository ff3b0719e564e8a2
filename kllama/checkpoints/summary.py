"""What a checkpoint is, in numbers, told without its weights: sizes, parameters by part, and the memory that it needs.

Arithmetic on what opening a checkpoint gave; reads no file. `kllama inspect` prints it.
"""

import math
from collections import Counter

from kllama.checkpoints.checkpoint import Checkpoint
from kllama.checkpoints.name_map import expected_tensors

LORA_RANK = 8
TOKENS = 1024
"""The length of the sequence that the figures of memory are for."""

_BYTES = {"float32": 4, "bfloat16": 2}
# float32 copies that Adam training keeps of each weight that trains: gradient, and two moments beside the weight.
_ADAM_BYTES = 12
# float32 arrays of the size of the logits that are there at once in training: the logits, their probabilities, what the
# loss and the metrics make of them, and the gradient. As measured on PyTorch; the other frameworks take more.
_LOGITS = 5


def count_parameters(config: dict) -> dict[str, int]:
    """Count the parameters of each part of a model.

    Args:
        config: arguments of `LlamaBackbone`, as a checkpoint has them.

    Returns:
        The number by part, in the order of the computation, without parts that have none. A head that is tied to the
        embedding has none of its own.
    """
    parts = Counter({"embedding": 0, "attention": 0, "feed-forward": 0, "normalization": 0, "head": 0})
    for tensor in expected_tensors({**config, "num_layers": 1}):
        per_layer = config["num_layers"] if tensor.path.startswith("transformer_layer_") else 1
        parts[_part(tensor.path)] += math.prod(tensor.shape) * per_layer
    return {part: count for part, count in parts.items() if count}


def estimate_memory(config: dict) -> dict[str, dict[str, int]]:
    """Estimate the bytes that a model needs, for one sequence of `TOKENS` tokens.

    To run: the weights, and the keys and values of the cache. To fine-tune: the weights, for each one that trains a
    gradient and Adam's two moments in float32, what the layers keep for the gradient, and what the loss makes of the
    logits. What a framework takes beside that is not in it.

    Args:
        config: arguments of `LlamaBackbone`, as a checkpoint has them.

    Returns:
        By what is done, `"run"`, `"fine-tune with LoRA"` and `"fine-tune all weights"`, the bytes by dtype.
    """
    num_weights = sum(count_parameters(config).values())
    head_dims = config["num_key_value_heads"] * config["head_dim"]
    cache = 2 * config["num_layers"] * TOKENS * head_dims
    memory = {"run": {}, "fine-tune with LoRA": {}, "fine-tune all weights": {}}
    for dtype, size in _BYTES.items():
        training = num_weights * size + _kept_values(config) * size + _LOGITS * TOKENS * config["vocabulary_size"] * 4
        memory["run"][dtype] = (num_weights + cache) * size
        memory["fine-tune with LoRA"][dtype] = training + count_lora(config) * (4 + _ADAM_BYTES)
        memory["fine-tune all weights"][dtype] = training + num_weights * _ADAM_BYTES
    return memory


def count_lora(config: dict, rank: int = LORA_RANK) -> int:
    """Count the parameters of LoRA on the query and value projections, as PEFT counts them.

    Reference: Hu et al., "LoRA" (arXiv:2106.09685), section 4.2.
    """
    query, value = (config[heads] * config["head_dim"] for heads in ("num_query_heads", "num_key_value_heads"))
    return config["num_layers"] * rank * (2 * config["hidden_dim"] + query + value)


def summarize(checkpoint: Checkpoint) -> dict:
    """Describe an opened checkpoint as plain data, ready for JSON."""
    config, parameters = checkpoint.backbone_config, count_parameters(checkpoint.backbone_config)
    return {
        "format": checkpoint.format,
        "path": str(checkpoint.path),
        "architecture": {**config, "has_head": checkpoint.has_head},
        "parameters": {**parameters, "total": sum(parameters.values())},
        "stored_bytes": {**checkpoint.stored_bytes, "total": sum(checkpoint.stored_bytes.values())},
        "memory": estimate_memory(config),
        "generation": dict(checkpoint.generation_config),
        "open_questions": dict(checkpoint.open_questions),
    }


def _part(path: str) -> str:
    if path.endswith("/reverse_embeddings"):
        return "head"
    if path.startswith("token_embedding/"):
        return "embedding"
    if path.endswith("/scale"):
        return "normalization"
    return "attention" if "/self_attention/" in path else "feed-forward"


def _kept_values(config: dict) -> int:
    """Count what the layers keep of one sequence for the gradient: the inputs of their products and normalizations.

    Of each layer: two inputs of normalizations and their results, query, key, value and context, and the gate, its
    activation, the other half and their product. Attention scores are not kept by fused kernels.
    """
    heads = 2 * config["num_query_heads"] + 2 * config["num_key_value_heads"]
    per_token = 4 * config["hidden_dim"] + heads * config["head_dim"] + 4 * config["intermediate_dim"]
    return config["num_layers"] * TOKENS * per_token
