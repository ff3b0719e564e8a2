"""Programs on PyTorch: functions that run as they are, but for the steps of a loop, which may be compiled or captured.

On a CPU steps run one operation at a time, or compiled by `torch.compile` where a model asks for it. On a GPU the first
step of a loop runs so, too, the second is captured as a CUDA graph, and the others replay it: the host would take
longer to start a step's operations than the GPU to do them. No GPU has run this: the tests put another object in the
place of the graph, one whose replay takes the captured step again.
"""

import contextvars
import types

import keras
import torch

_COMPILE = contextvars.ContextVar("compiles the steps of the program that is running", default=None)


def run_while(is_running, step, state, is_capturable: bool = False):
    """Give the state after `state = step(state)` was done for as long as `is_running(state)`.

    Args:
        is_running: function (state) -> bool scalar.
        step: function (state) -> state.
        state: nested arrays, used up.
        is_capturable: as for `run_steps`; where it is, the step may be compiled.
    """
    if is_capturable and (compile_step := _COMPILE.get()) is not None:
        step = compile_step(step, state)
    while is_running(state):
        state = step(state)
    return state


def run_steps(step, is_over, caches, rest, num_steps, most_steps: int, is_capturable: bool = True):
    """Take steps until there were `num_steps` of them, or it is over.

    Args:
        step: function (caches, rest) -> (caches, rest), both nested arrays. It writes to the caches in place, and if
            it is taken once too often, it writes there only what the next step would write, too.
        is_over: function (rest) -> bool scalar.
        caches: used up.
        rest: the rest of the state.
        num_steps: int32 scalar.
        most_steps: what `num_steps` is at most.
        is_capturable: whether a step does nothing but compute: no function of a caller's, say, that may look at
            numbers. One that does more runs as it is.

    Returns:
        `(caches, rest)`.
    """
    num_steps = min(int(num_steps), most_steps)
    if is_capturable and (compile_step := _COMPILE.get()) is not None:
        step = compile_step(step, caches, rest)
    elif is_capturable and num_steps > 2 and keras.tree.flatten(caches)[0].device.type == "cuda":
        return replay_steps(step, caches, rest, num_steps, CudaGraph())
    for _ in range(num_steps):
        if is_over(rest):
            break
        caches, rest = step(caches, rest)
    return caches, rest


class CudaGraph:
    """Work on a GPU that is recorded once, and started again as a whole."""

    def __init__(self):
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work) -> None:
        """Record what a function without arguments starts, without doing it."""
        with torch.cuda.graph(self._graph):
            work()

    def replay(self) -> None:
        """Do what was recorded, with what its tensors hold by now."""
        self._graph.replay()


def replay_steps(step, caches, rest, num_steps: int, graph) -> tuple:
    """Take exactly `num_steps` steps, all but the first as replays of a graph.

    A graph has its tensors built in. So each step ends by copying the rest of its state over that of the step before;
    the caches are written in place anyway. Nobody looks between two steps whether it is over: that would make the GPU
    wait for the host.

    Args:
        step: see `run_steps`.
        caches: used up.
        rest: the rest of the state.
        num_steps: at least 1.
        graph: a `CudaGraph`.

    Returns:
        `(caches, rest)`.
    """
    caches, rest = step(caches, rest)  # Libraries set themselves up, which cannot be captured.
    rest = keras.tree.map_structure(torch.clone, rest)  # No two of them may share memory, nor have the caller's.

    def work():
        _, after = step(caches, rest)
        for old, new in zip(keras.tree.flatten(rest), keras.tree.flatten(after), strict=True):
            old.copy_(new)

    graph.capture(work)
    for _ in range(num_steps - 1):
        graph.replay()
    return caches, rest


def compile_function(
    function, variables, *, donates: bool = False, is_eager: bool = False, jit_compile: bool | str = "auto"
):
    """Compile `function(*arrays)`, which reads Keras variables.

    PyTorch runs it as it is, without gradients: its variables are read at each call.

    Args:
        function: a pure function of nested arrays.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        donates: whether the first argument may be changed in place: the caller gives it away.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: True compiles the steps of its loops with `torch.compile`, which needs a C++ compiler and raises
            its own error where there is none. "auto" is False.
    """
    del variables, donates
    if is_eager or jit_compile is not True:
        return torch.inference_mode()(function)
    compile_step = StepCompiler()

    @torch.inference_mode()
    def run(*arrays):
        token = _COMPILE.set(compile_step)
        try:
            return function(*arrays)
        finally:
            _COMPILE.reset(token)

    return run


class StepCompiler:
    """Compiles the steps of a program, once for each set of shapes."""

    def __init__(self):
        self._codes = {}

    def __call__(self, step, *state):
        """Give the compiled form of a step, which is a new closure each time, over the shapes of a state."""
        shapes = tuple(tuple(x.shape) for x in keras.tree.flatten(state))
        # What torch.compile has compiled it finds by the code object, and it gives up after a few programs for one. So
        # each set of shapes has a code object of its own.
        code = self._codes.setdefault(shapes, step.__code__.replace())
        own = types.FunctionType(code, step.__globals__, step.__name__, step.__defaults__, step.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False)
