"""How the steps of a program run on PyTorch: one by one, compiled, or as replays of a graph."""

import functools

import pytest

from kllama import backend
from kllama.backend import torch_programs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.only_on("torch")


class Graph:
    """Stands for a CUDA graph: to replay it is to take the recorded steps again, with the tensors of then."""

    def __init__(self):
        self.num_replays = 0

    def capture(self, work):
        self._work = work

    def replay(self):
        self.num_replays += 1
        self._work()


def fill(cache, rest):
    """Write the next number to the next place of a cache, as a step of the engine writes keys and values."""
    index, numbers, unchanged = rest
    cache.index_copy_(0, index.reshape(-1).long(), numbers["last"] + 1)
    return cache, (index + 1, {"last": numbers["last"] + 1, "sum": numbers["sum"] + numbers["last"]}, unchanged)


def fresh_state():
    numbers = {"last": torch.ones(1), "sum": torch.zeros(1)}
    return torch.zeros(9), (torch.tensor(0), numbers, torch.tensor([7.0]))


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_replays_do_what_steps_do(num_steps):
    cache, rest = fresh_state()
    for _ in range(num_steps):
        cache, rest = fill(cache, rest)
    graph, (own_cache, own_rest) = Graph(), fresh_state()
    found_cache, found = torch_programs.replay_steps(fill, own_cache, own_rest, num_steps, graph)
    assert graph.num_replays == num_steps - 1
    assert found_cache.data_ptr() == own_cache.data_ptr()
    assert found_cache.tolist() == cache.tolist() == [*range(2, 2 + num_steps), *[0] * (9 - num_steps)]
    assert found == rest
    assert own_rest == fresh_state()[1]  # what a caller still holds was not written to


class TestRunSteps:
    def run(self, num_steps, **options):
        return backend.run_steps(fill, self.is_over, *fresh_state(), torch.tensor(num_steps), 8, **options)

    @staticmethod
    def is_over(rest):
        return rest[0] >= 5

    @pytest.mark.parametrize(("num_steps", "taken"), [(0, 0), (3, 3), (7, 5)])
    def test_ends(self, num_steps, taken):
        _, (index, _, _) = self.run(num_steps)
        assert index == taken

    @pytest.mark.parametrize(("jit_compile", "is_capturable"), [(True, True), (True, False), ("auto", True)])
    def test_what_is_compiled(self, monkeypatch, jit_compile, is_capturable):
        compiled = []

        def compile(step, *, fullgraph, dynamic):
            compiled.append((step.__name__, fullgraph, dynamic))
            return step

        monkeypatch.setattr(torch, "compile", compile)
        run = functools.partial(self.run, is_capturable=is_capturable)
        _, (index, _, _) = backend.compile_function(run, [], jit_compile=jit_compile)(3)
        assert index == 3
        assert compiled == ([("fill", True, False)] if (jit_compile, is_capturable) == (True, True) else [])
        self.run(3)
        assert len(compiled) <= 1  # nothing outside of the program


def test_any_number_of_shapes_can_be_compiled(monkeypatch):
    """torch.compile gives up after some programs for one function, eight of them by default."""
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: torch_compile(step, backend="eager", **options))
    compiler = torch_programs.StepCompiler()
    for size in range(2, 14):
        rest = torch.tensor(0), {"last": torch.ones(1), "sum": torch.zeros(1)}, torch.ones(size)
        _, (index, _, _) = compiler(fill, torch.zeros(size), rest)(torch.zeros(size), rest)
        assert index == 1
