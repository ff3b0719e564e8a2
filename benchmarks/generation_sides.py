"""One side of `generation.py`: a library in a process of its own, which loads models and continues prompts on request.

    python benchmarks/generation_sides.py kllama float32

It reads one JSON request a line and answers each with one line; what the libraries print goes to stderr. The library is
imported before the first request. What is timed is the library's public call, from arrays to arrays; for llama.cpp it
is the loop that its own examples have. `generation.py` starts it and decides whose turn it is.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    library, dtype = sys.argv[1:]
    side = _SIDES[library](dtype)
    answers.write(json.dumps(memory()) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(side, request.pop("do"))(**request)
        answers.write(json.dumps({**answer, **memory()}) + "\n")


def memory() -> dict[str, int]:
    """Give the bytes that this process has in memory, and the most that it ever had."""
    # Not `ru_maxrss`, which begins at what the process had that started this one.
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[key].split()[0]) for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


class Side:
    """A library. The subclasses say how it loads a model, and how it continues prompts greedily.

    Args:
        dtype: of the weights, `"float32"` or `"bfloat16"`.
    """

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.models = {}

    def load(self, model: str, path: str) -> dict:
        """Load a model."""
        start = time.perf_counter()
        self.models[model] = self.open(path)
        return {"seconds": time.perf_counter() - start}

    def write(self, model: str, prompts: list[list[int]], num_new: int, width: int, stop: int | None) -> dict:
        """Continue prompts, and note the time.

        Args:
            model: one that was loaded.
            prompts: a row of ids each.
            num_new: how many ids each row is to get.
            width: how long a row is at the end, for a library that cannot be told `num_new`.
            stop: the id that the only row gets last, for such a library whose `width` is larger than needed.

        Returns:
            The seconds, and the new ids of each row.
        """
        call = self.prepare(self.models[model], prompts, num_new, width, stop)
        start = time.perf_counter()
        rows = call()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "new": [list(map(int, row)) for row in rows]}

    def open(self, path: str):
        """Load the model at a path."""
        raise NotImplementedError

    def prepare(self, model, prompts, num_new, width, stop) -> Callable:
        """Give the function that is timed, which gives the new ids."""
        raise NotImplementedError


class Kllama(Side):
    """`kllama.LlamaCausalLM.generate` on token ids."""

    def __init__(self, dtype: str):
        super().__init__(dtype)
        import kllama

        self.library = kllama.LlamaCausalLM

    def open(self, path):
        return self.library.from_preset(path, dtype=self.dtype, preprocessor=None)

    def prepare(self, model, prompts, num_new, width, stop):
        del width, stop
        inputs = padded(prompts, max(map(len, prompts)))

        def call():
            outputs = model.generate(inputs, max_new_tokens=num_new, temperature=0, stop_token_ids=None)
            return behind(prompts, outputs["token_ids"], num_new)

        return call

    def gap(self, model: str, row: list[int], ids: list[int]) -> dict:
        """Give how far apart the logits of two next ids are, in standard deviations of all logits."""
        from keras import ops

        inputs = {"token_ids": np.array([row], "int32"), "padding_mask": None}
        logits = ops.convert_to_numpy(self.models[model](inputs))[0, -1]
        return {"gap": float(abs(logits[ids[0]] - logits[ids[1]]) / logits.std())}


class KerasHub(Side):
    """KerasHub's `generate` on padded ids, which saves it its preprocessing."""

    def __init__(self, dtype: str):
        super().__init__(dtype)
        import keras_hub

        self.library = keras_hub.models

    def open(self, path):
        model = self.library.LlamaCausalLM(self.library.LlamaBackbone.from_preset(path, dtype=self.dtype))
        model.compile(sampler="greedy")
        return model

    def prepare(self, model, prompts, num_new, width, stop):
        inputs = padded(prompts, width)

        def call():
            outputs = model.generate(dict(inputs), stop_token_ids=None if stop is None else [stop])
            return behind(prompts, outputs["token_ids"], num_new)

        return call


class Transformers(Side):
    """transformers' `generate`, eager, on ids padded on the left."""

    def __init__(self, dtype: str):
        super().__init__(dtype)
        import torch
        import transformers

        self.torch, self.library = torch, transformers.LlamaForCausalLM

    def open(self, path):
        return self.library.from_pretrained(path, dtype=getattr(self.torch, self.dtype)).eval()

    def prepare(self, model, prompts, num_new, width, stop):
        del width, stop
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(row)) + row for row in prompts]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
        ids, mask = self.torch.tensor(ids), self.torch.tensor(mask)

        def call():
            outputs = model.generate(
                ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            return outputs[:, longest:].numpy()

        return call


class LlamaCpp(Side):
    """llama.cpp through the C functions that llama-cpp-python has, with caches in float32."""

    def __init__(self, dtype: str):
        super().__init__(dtype)
        import llama_cpp

        self.library = llama_cpp
        self.shape, self.context = None, None
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        llama_cpp.llama_backend_init()

    def open(self, path):
        model = self.library.llama_model_load_from_file(
            f"{path}.gguf".encode(), self.library.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}.gguf.")
        return model

    def prepare(self, model, prompts, num_new, width, stop):
        del width, stop
        num_slots = -(-(max(map(len, prompts)) + num_new) // 256) * 256
        context = self._context(model, len(prompts), num_slots)
        batch = self.library.llama_batch_init(sum(map(len, prompts)), 0, 1)

        def call():
            lib = self.library
            lib.llama_memory_clear(lib.llama_get_memory(context), False)
            news = [(row, 0) for row in prompts]  # what each sequence gets next, and from which position on
            written = []
            for _ in range(num_new):
                last = _fill(batch, news)
                if lib.llama_decode(context, batch):
                    raise RuntimeError("llama_decode failed.")
                tokens = [lib.llama_sampler_sample(self.sampler, context, at) for at in last]
                written.append(tokens)
                news = [([token], start + len(new)) for token, (new, start) in zip(tokens, news, strict=True)]
            return np.array(written).T

        return call

    def _context(self, model, num_rows: int, num_slots: int):
        """Give a context for so many sequences: a new one where the last one had another shape."""
        if self.shape != (model, num_rows, num_slots):
            if self.context is not None:
                self.library.llama_free(self.context)
            settings = self.library.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = num_rows * num_slots, num_rows
            settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
            settings.type_k = settings.type_v = self.library.GGML_TYPE_F32
            self.context = self.library.llama_init_from_model(model, settings)
            self.shape = model, num_rows, num_slots
        return self.context


def _fill(batch, news: list[tuple[list[int], int]]) -> list[int]:
    """Put the next ids of each sequence into a batch, and give the places of the last ones, whose logits count."""
    count, last = 0, []
    for sequence, (new, start) in enumerate(news):
        for i, token in enumerate(new):
            batch.token[count], batch.pos[count], batch.n_seq_id[count] = token, start + i, 1
            batch.seq_id[count][0], batch.logits[count] = sequence, i == len(new) - 1
            count += 1
        last.append(count - 1)
    batch.n_tokens = count
    return last


def padded(prompts: list[list[int]], width: int) -> dict[str, np.ndarray]:
    """Pad prompts on the right."""
    token_ids = np.zeros((len(prompts), width), "int32")
    mask = np.zeros_like(token_ids)
    for i, row in enumerate(prompts):
        token_ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"token_ids": token_ids, "padding_mask": mask}


def behind(prompts: list[list[int]], token_ids: np.ndarray, num_new: int) -> list[np.ndarray]:
    """Give the ids that follow each prompt."""
    return [ids[len(row) : len(row) + num_new] for row, ids in zip(prompts, token_ids, strict=True)]


_SIDES = {"kllama": Kllama, "KerasHub": KerasHub, "transformers": Transformers, "llama.cpp": LlamaCpp}

if __name__ == "__main__":
    main()
