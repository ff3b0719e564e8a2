"""The sums and gradients of the fused loss against NumPy, and what it never holds."""

import keras
import numpy as np
import pytest
from keras import ops

from kllama.core import linear_cross_entropy as fused
from kllama.core.linear_cross_entropy import linear_cross_entropy

NUM_ROWS, HIDDEN_DIM, NUM_TOKENS = 53, 8, 70


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch):
    """Let 53 rows be four chunks of 16, the last of which is filled up."""
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", 16 * NUM_TOKENS)


def arrays(transpose):
    random = np.random.default_rng(7)
    hidden_states = random.normal(0, 1, (NUM_ROWS, HIDDEN_DIM)).astype("float32")
    kernel = random.normal(0, 1, (HIDDEN_DIM, NUM_TOKENS)).astype("float32")
    kernel[:, 40] = kernel[:, 11]  # two tokens that are always level: the first of them is the hit
    logits = hidden_states.astype("float64") @ kernel
    labels = np.where(random.random(NUM_ROWS) < 0.5, logits.argmax(-1), random.integers(0, NUM_TOKENS, NUM_ROWS))
    labels = np.where(labels == 11, 40, labels).astype("int32")
    weights = random.integers(0, 3, NUM_ROWS).astype("float32")
    return hidden_states, kernel.T.copy() if transpose else kernel, labels, weights


def expected(hidden_states, kernel, labels, weights, transpose):
    """Compute sums, and the gradients of the first one, in float64."""
    kernel = (kernel.T if transpose else kernel).astype("float64")
    logits = hidden_states.astype("float64") @ kernel
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    losses = -np.log(probabilities[np.arange(NUM_ROWS), labels])
    hits = logits.argmax(-1) == labels
    slope = weights[:, None] * (probabilities - np.eye(NUM_TOKENS)[labels])
    of_kernel = hidden_states.T @ slope
    return [(weights * losses).sum(), (weights * hits).sum()], slope @ kernel.T, of_kernel.T if transpose else of_kernel


def with_gradients(function, *inputs):
    """Give the result of a function, and the gradients of its first number by its inputs."""
    backend = keras.config.backend()
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    if backend == "jax":
        import jax

        def first(*inputs):
            result = function(*inputs)
            return result[0], result

        (_, result), gradients = jax.value_and_grad(first, range(len(inputs)), has_aux=True)(*inputs)
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            result = function(*inputs)
            first = result[0]
        gradients = tape.gradient(first, inputs)
    else:
        inputs = [x.detach().requires_grad_() for x in inputs]
        result = function(*inputs)
        result[0].backward()
        gradients = [x.grad for x in inputs]
    return ops.convert_to_numpy(result), [None if x is None else ops.convert_to_numpy(x) for x in gradients]


@pytest.mark.parametrize("trains_kernel", [True, False])
@pytest.mark.parametrize("transpose", [False, True])
def test_sums_and_gradients(transpose, trains_kernel):
    hidden_states, kernel, labels, weights = arrays(transpose)
    rest = [ops.convert_to_tensor(x) for x in (labels, weights)]

    def run(hidden_states, kernel):
        return 3 * linear_cross_entropy(hidden_states, kernel, *rest, transpose=transpose, trains_kernel=trains_kernel)

    sums, of_rows, of_kernel = expected(hidden_states, kernel, labels, weights, transpose)
    if trains_kernel:
        found, gradients = with_gradients(run, hidden_states, kernel)
        np.testing.assert_allclose(gradients[1], 3 * of_kernel, atol=1e-4)
    else:
        found, gradients = with_gradients(lambda x: run(x, ops.convert_to_tensor(kernel)), hidden_states)
    np.testing.assert_allclose(found, 3 * np.array(sums), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], 3 * of_rows, atol=1e-4)
    assert 0 < sums[1] < weights.sum()


def sizes_made(function, *inputs) -> list[int]:
    """List how many elements each array has that a function with its gradients makes."""
    if keras.config.backend() == "jax":
        import jax
        import jax.extend

        def all_sizes(jaxpr):
            for equation in jaxpr.eqns:
                yield from (variable.aval.size for variable in equation.outvars)
                for inner in jax.extend.core.jaxprs_in_params(equation.params):
                    yield from all_sizes(inner)

        program = jax.make_jaxpr(jax.value_and_grad(lambda *inputs: function(*inputs)[0], (0, 1)))(*inputs)
        return list(all_sizes(program.jaxpr))
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(*inputs):
            return tf.gradients(function(*inputs)[0], inputs)

        graph = run.get_concrete_function(*(tf.constant(x) for x in inputs)).graph
        graphs = [graph, *(function.graph for function in graph._functions.values() if hasattr(function, "graph"))]
        tensors = [tensor for graph in graphs for operation in graph.get_operations() for tensor in operation.outputs]
        return [tensor.shape.num_elements() or 0 for tensor in tensors]
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            results = operation(*arguments, **(keywords or {}))
            made.extend(x.numel() for x in keras.tree.flatten(results) if isinstance(x, torch.Tensor))
            return results

    with Sizes():
        with_gradients(function, *inputs)
    return made


def test_no_array_of_all_logits():
    hidden_states, kernel, labels, weights = arrays(False)
    rest = [ops.convert_to_tensor(x) for x in (labels, weights)]

    def run(hidden_states, kernel):
        return linear_cross_entropy(hidden_states, kernel, *rest)

    def plain(hidden_states, kernel):
        logits = ops.logsumexp(ops.matmul(hidden_states, kernel), -1)
        return ops.stack([ops.sum(logits), ops.sum(logits)])

    assert max(sizes_made(plain, hidden_states, kernel)) >= NUM_ROWS * NUM_TOKENS  # that they would be seen
    sizes = sizes_made(run, hidden_states, kernel)
    assert 16 * NUM_TOKENS in sizes and max(sizes) < NUM_ROWS * NUM_TOKENS
