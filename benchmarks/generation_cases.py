"""What `generation.py` measures: the shapes of the models, their random weights, and the cases."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file


class Size(NamedTuple):
    """A model, in the letters of CONTRIBUTING.md."""

    L: int
    D: int
    N: int
    F: int
    V: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the tensors of a Hugging Face checkpoint."""
        block = {
            **dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), (self.D, self.D)),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (self.F, self.D)),
            "mlp.down_proj": (self.D, self.F),
            **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (self.D,)),
        }
        blocks = {f"model.layers.{i}.{name}": shape for i in range(self.L) for name, shape in block.items()}
        ends = {"model.embed_tokens": (self.V, self.D), "model.norm": (self.D,), "lm_head": (self.V, self.D)}
        return {f"{name}.weight": shape for name, shape in (blocks | ends).items()}

    def num_weights(self, is_read: bool = False) -> int:
        """Count the weights: all, or those that a step reads whole, which leaves the embedding table out."""
        sizes = {name: int(np.prod(shape)) for name, shape in self.shapes().items()}
        return sum(sizes.values()) - is_read * sizes["model.embed_tokens.weight"]


SIZES = {"15M": Size(6, 288, 6, 768, 32000), "110M": Size(12, 768, 12, 2048, 32000), "tiny": Size(2, 32, 2, 64, 300)}


class Case(NamedTuple):
    """What every side is to write."""

    name: str
    title: str
    model: str
    lengths: tuple[int, ...]  # of the prompts
    num_new: int
    width: int  # KerasHub's max_length
    sides: tuple[str, ...] = ("kllama", "KerasHub", "transformers", "llama.cpp")

    def has_stop(self) -> bool:
        """Tell whether KerasHub needs a stop id to write no more than the others."""
        return len(self.lengths) == 1 and self.width > self.lengths[0] + self.num_new

    def small(self) -> "Case":
        """Make a case of the same kind that takes no time."""
        lengths = tuple(min(length, 5 + i) for i, length in enumerate(self.lengths))
        return self._replace(
            model="tiny", lengths=lengths, num_new=8, width=max(lengths) + (28 if self.has_stop() else 8)
        )


BFLOAT16 = "kllama bfloat16"
RAGGED = (8, 25, 42, 59, 77, 94, 111, 128)
CASES = (
    Case("short-15M", "prompt 16 + 128", "15M", (16,), 128, 144, (*Case._field_defaults["sides"], BFLOAT16)),
    Case("short-110M", "prompt 16 + 128", "110M", (16,), 128, 144, (*Case._field_defaults["sides"], BFLOAT16)),
    Case("preset-1024", "prompt 16 + 32, max_length 1024", "110M", (16,), 32, 1024),
    Case("long-prompt", "prompt 1000 + 64", "110M", (1000,), 64, 1064),
    Case("ragged", "8 prompts of 8 to 128, + 64", "15M", RAGGED, 64, 192),
    Case("batch-15M", "8 prompts of 16, + 128", "15M", (16,) * 8, 128, 144),
    Case("batch-110M", "8 prompts of 16, + 128", "110M", (16,) * 8, 128, 144, ("kllama", "transformers", "llama.cpp")),
)


def write_checkpoint(path: Path, size: Size) -> None:
    """Write random weights as a Hugging Face directory."""
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.standard_normal(shape, "float32") * np.float32(0.02)
        if len(shape) > 1
        else np.ones(shape, "float32")
        for name, shape in size.shapes().items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.V,
        "hidden_size": size.D,
        "intermediate_size": size.F,
        "num_hidden_layers": size.L,
        "num_attention_heads": size.N,
        "num_key_value_heads": size.N,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def bytes_per_step(case: Case, dtype: str) -> int:
    """Count the bytes that a step has to read: the weights, and the keys and values of the positions so far."""
    size, width = SIZES[case.model], 2 if dtype == "bfloat16" else 4
    num_positions = sum(length + case.num_new / 2 for length in case.lengths)  # on average
    return int(width * (size.num_weights(is_read=True) + num_positions * 2 * size.L * size.D))
