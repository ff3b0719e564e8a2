"""What the engine's compiled programs are made of: read off them, without a clock.

All sizes are such that no two kinds of tensor have the same number of elements.
"""

import math
import re

import keras
import numpy as np
import pytest

import kllama
from kllama import backend

SIZES = {
    "vocabulary_size": 331,
    "num_layers": 2,
    "num_query_heads": 6,
    "hidden_dim": 42,
    "intermediate_dim": 74,
    "num_key_value_heads": 3,
    "head_dim": 34,
    "initializer_range": 0.3,
}
GREEDY = {"temperature": 0}
EVERY_STEP = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 1}


class Seen(Exception):
    """Ends a call of `generate` at its decode program."""


def make_model(dtype="float32", mode=None, lora=False, **sizes):
    model = kllama.LlamaCausalLM(kllama.LlamaBackbone(**{**SIZES, **sizes}, dtype=dtype))
    if mode is not None:
        model.quantize(mode)
    if lora:
        model.backbone.enable_lora(2)
    return model


def generate(model, length=3, max_new_tokens=200, **call):
    inputs = {"token_ids": np.arange(3, 3 + length)[None].astype("int32")}
    output = model.generate(inputs, max_new_tokens=max_new_tokens, stop_token_ids=None, **call)
    return output["token_ids"][0].tolist()


@pytest.fixture
def decode_program(monkeypatch):
    """Build a function (model, arguments of `generate`) -> (its decode program, what that was called with)."""

    def find(model, **call):
        compile_function = backend.compile_function

        def compile_but_do_not_run(function, variables, *, donates, **options):
            program = compile_function(function, variables, donates=donates, **options)

            def run(*arguments):
                if donates:
                    raise Seen(program, arguments)
                return program(*arguments) if keras.config.backend() == "torch" else zeros_instead(program, arguments)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(backend, "compile_function", compile_but_do_not_run)
            with pytest.raises(Seen) as seen:
                generate(model, **call)
        return seen.value.args

    return find


def zeros_instead(program, arguments):
    """Give zeros of the shapes of a program's results, which takes no compilation."""
    if keras.config.backend() == "tensorflow":
        results = program.get_concrete_function(*arguments).structured_outputs
    else:
        results = program.lower(*arguments).out_info
    dtype = keras.backend.standardize_dtype
    return keras.tree.map_structure(lambda x: keras.ops.zeros(x.shape, dtype(x.dtype)), results)


class Optimised:
    """The text of an optimised XLA program, as lists of (dtype, elements, operation), one for each instruction.

    Attributes:
        text: the program.
        memory: JAX's analysis of the memory that it needs.
        entry: what runs once.
        loops: what runs in the bodies of loops.
        inner: what fusions are made of, whose results but the last one are never written to memory.
    """

    def __init__(self, text: str, memory=None):
        self.text, self.memory = text, memory
        self.entry, self.loops, self.inner = [], [], []
        fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))
        for header, body in re.findall(r"^((?:ENTRY )?%?[\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S):
            is_entry, name = header.startswith("ENTRY"), header.removeprefix("ENTRY ").removeprefix("%")
            part = self.entry if is_entry else self.inner if name in fused else self.loops
            for dtype, sizes, name in re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", body):
                if name not in ("parameter", "get-tuple-element", "bitcast", "tuple"):
                    part.append((dtype, math.prod(map(int, sizes.split(","))) if sizes else 1, name))

    def moves(self, elements: int, parts: tuple = ("entry", "loops", "inner")) -> int:
        """Count the copies, conversions and transposes of arrays of some size."""
        found = [result for part in parts for result in getattr(self, part)]
        return sum(size == elements and name in ("copy", "convert", "transpose") for _, size, name in found)


def optimised(program, arguments) -> Optimised:
    if keras.config.backend() == "tensorflow":
        return Optimised(program.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo"))
    # The test suite asks XLA for one thread, which means other kernels.
    compiled = program.lower(*arguments).compile({"xla_cpu_multi_thread_eigen": True})
    return Optimised(compiled.as_text(), compiled.memory_analysis())


def cache_size(arguments) -> int:
    """Give the number of elements of the keys, or of the values, of a layer."""
    size = math.prod(arguments[0].caches[0][0].shape)
    assert size > 200 * 3 * 34
    return size


def kernel_sizes(model) -> set[int]:
    """Give the numbers of elements of a model's kernels and tables."""
    sizes = {math.prod(weight.shape) for weight in model.backbone.weights if len(weight.shape) > 1}
    return {size for size in sizes if size > 1000}  # not of LoRA's matrices, nor of scales


MODELS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, tied": {"dtype": "bfloat16", "tie_word_embeddings": True},
    "int8": {"mode": "int8"},
    "int8, tied": {"mode": "int8", "tie_word_embeddings": True},
    "mixed": {"dtype": "mixed_bfloat16"},
    "lora": {"lora": True},
}


@pytest.mark.only_on("jax", "tensorflow")
@pytest.mark.parametrize("name", MODELS)
def test_decode_neither_copies_caches_nor_widens_kernels(decode_program, name):
    model = make_model(**MODELS[name])
    program, arguments = decode_program(model, **GREEDY)
    text = optimised(program, arguments)
    sizes, size = kernel_sizes(model), cache_size(arguments)
    assert text.loops and len(sizes) == 4 and size not in sizes
    # TensorFlow gives no memory away: it copies each cache once.
    assert text.moves(size, ("entry",)) == (4 if keras.config.backend() == "tensorflow" else 0)
    assert text.moves(size, ("loops", "inner")) == 0
    assert [result for result in text.loops if result[1] in sizes] == []
    if name not in ("mixed", "lora"):  # which make kernels, once a call
        assert [result for result in text.entry if result[1] in sizes] == []
    else:
        made = {"mixed": "bf16", "lora": "f32"}[name]
        assert {dtype for dtype, size, _ in text.entry if size in sizes} == {made}
    if keras.config.backend() == "jax":
        caches = 2 * 2 * 4 * size
        assert text.memory.alias_size_in_bytes >= caches
        if name not in ("mixed", "lora"):
            assert text.memory.temp_size_in_bytes < 0.05 * caches + 4 * 2 * 331


@pytest.mark.only_on("jax", "tensorflow")
def test_no_way_to_choose_a_token_sorts(decode_program):
    text = optimised(*decode_program(make_model(), **EVERY_STEP)).text
    assert len(text) > 10_000
    assert re.findall(r" sort\(|TopK|topk", text) == []


def test_the_head_reads_one_position_of_a_prompt(monkeypatch):
    shapes = []
    logits = kllama.generation.network.Network.logits

    def noting(self, hidden_states):
        shapes.append(tuple(hidden_states.shape))
        return logits(self, hidden_states)

    monkeypatch.setattr(kllama.generation.network.Network, "logits", noting)
    generate(make_model(), length=19, max_new_tokens=2)
    assert set(shapes) == {(1, 42)}


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int8, tied"])
def test_a_step_makes_nothing_as_large_as_a_cache(decode_program, name):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            results = operation(*arguments, **(keywords or {}))
            tensors = [x for x in keras.tree.flatten(results) if isinstance(x, torch.Tensor)]
            made.extend((x.numel(), x.untyped_storage().data_ptr()) for x in tensors)
            return results

    model = make_model(**MODELS[name])
    program, arguments = decode_program(model, **GREEDY)
    before = {x.untyped_storage().data_ptr() for x in keras.tree.flatten(arguments)}
    before |= {variable.value.untyped_storage().data_ptr() for variable in model.variables}
    with Sizes():
        program(*arguments)
    assert len(made) > 1000
    assert [size for size, place in made if size >= min(kernel_sizes(model)) and place not in before] == []
    assert min(kernel_sizes(model)) < cache_size(arguments)


@pytest.mark.only_on("torch")
@pytest.mark.parametrize(("name", "call"), [("float32", EVERY_STEP), ("int8, tied", GREEDY), ("mixed", GREEDY)])
def test_a_step_is_one_graph_for_all_numbers(monkeypatch, name, call):
    import torch

    model = make_model(**MODELS[name])
    lengths = {5: 100, 30: 72}  # prompt: new tokens, in two chunks
    expected = [generate(model, *sizes, **call) for sizes in lengths.items()]
    graphs = []

    def noting(graph, _):
        graphs.append(graph)
        return graph

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: torch_compile(step, backend=noting, **options))
    model.compile(jit_compile=True)
    assert [generate(model, *sizes, **call) for sizes in lengths.items()] == expected
    assert len(graphs) == 1
