"""The primitives: one list of names with one signature, and the same meaning on every backend."""

import ast
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from kllama import backend

FOLDER = Path(__file__).resolve().parents[2] / "kllama" / "backend"
FRAMEWORKS = ("jax", "tensorflow", "torch")


def public_names(name: str) -> list[str]:
    """The `__all__` of a file, and proof that it defines each of them at its top."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.endswith("_programs"):  # the rest of the same file
            defined |= {alias.name for alias in node.names}
        if isinstance(node, ast.Assign):
            for target in node.targets:
                elements = target.elts if isinstance(target, ast.Tuple) else [target]
                defined |= {element.id for element in elements}
                if [element.id for element in elements] == ["__all__"]:
                    names = ast.literal_eval(node.value)
    assert not {name for name in defined - {"__all__"} if not name.startswith("_")} ^ set(names)
    return names


def signatures(name: str) -> dict[str, str]:
    """The arguments of each function that a file writes itself (others are the framework's own)."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {node.name: ast.unparse(node.args) for node in functions}


@pytest.mark.backend_independent
class TestTheThreeFiles:
    def test_same_names(self):
        jax, tensorflow, torch = map(public_names, FRAMEWORKS)
        assert jax == tensorflow == torch == sorted(jax) and len(jax) > 10

    @pytest.mark.parametrize("first, second", [("jax", "tensorflow"), ("jax", "torch"), ("tensorflow", "torch")])
    def test_same_signatures(self, first, second):
        one, other = signatures(first), signatures(second)
        shared = one.keys() & other.keys()
        assert len(shared) >= 8
        assert {name: one[name] for name in shared} == {name: other[name] for name in shared}


class TestPrimitives:
    def numpy(self, x):
        return ops.convert_to_numpy(ops.cast(x, "float32"))

    def tensor(self, x, dtype="float32"):
        return ops.convert_to_tensor(np.asarray(x), dtype)

    def test_numbers(self):
        x = np.array([[0.5, -2.0, 3.0], [4.0, 5.0, -6.0]])
        tensor = self.tensor(x)
        np.testing.assert_allclose(self.numpy(backend.cos(tensor)), np.cos(x), atol=1e-6)
        np.testing.assert_allclose(self.numpy(backend.sin(tensor)), np.sin(x), atol=1e-6)
        np.testing.assert_array_equal(self.numpy(backend.where(tensor > 0, tensor, 0)), np.maximum(x, 0))
        np.testing.assert_array_equal(self.numpy(backend.maximum(tensor, 1.0)), np.maximum(x, 1))
        np.testing.assert_array_equal(self.numpy(backend.reshape(tensor, (3, 2))), x.reshape(3, 2))
        np.testing.assert_array_equal(self.numpy(backend.einsum("ij,kj->ik", tensor, tensor)), x @ x.T)
        np.testing.assert_array_equal(self.numpy(backend.concatenate([tensor, tensor], -1)), np.concatenate([x, x], -1))
        np.testing.assert_array_equal(self.numpy(backend.cast(tensor, "bfloat16")), x)
        assert float(self.numpy(backend.reduce_max(tensor))) == 5
        exponentials = np.exp(x)
        expected = exponentials / exponentials.sum(-1, keepdims=True)
        np.testing.assert_allclose(self.numpy(backend.softmax(tensor)), expected, atol=1e-6)
        assert tuple(backend.shape(tensor)) == (2, 3)

    def test_arange_and_constant(self):
        like = self.tensor([1], "int32")
        np.testing.assert_array_equal(ops.convert_to_numpy(backend.arange(4, like)), [0, 1, 2, 3])
        assert "int32" in str(backend.arange(4, like).dtype)
        array = np.array([1.5, 2.5], "float32")
        np.testing.assert_array_equal(ops.convert_to_numpy(backend.constant(array, like)), array)

    def test_concrete_gives_the_values_of_an_eager_tensor(self):
        values = backend.concrete(self.tensor([[1, 0]], "int32"))
        assert isinstance(values, np.ndarray) and values.tolist() == [[1, 0]]

    def test_matmul_float32(self):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(2, 3, 64)), rng.normal(size=(64, 5))
        for transpose, matrix in ((False, kernel), (True, kernel.T)):
            product = backend.matmul_float32(self.tensor(x, "bfloat16"), self.tensor(matrix, "bfloat16"), transpose)
            assert "float32" in str(product.dtype)
            np.testing.assert_allclose(self.numpy(product), x @ kernel, atol=0.3)

    @pytest.mark.only_on("jax")
    def test_no_table_is_transposed_for_the_head(self):
        import jax

        x, table = self.tensor(np.ones((1, 2, 64))), self.tensor(np.ones((300, 64)))
        program = jax.make_jaxpr(lambda x, table: backend.matmul_float32(x, table, transpose=True))(x, table)
        assert [str(step.primitive) for step in program.eqns] == ["dot_general"]

    @pytest.mark.only_on("jax")
    def test_one_program(self):
        import jax

        @backend.one_program("power")
        def function(x, power):
            return (x + 1) ** power

        x = self.tensor([1.0, 2.0])
        np.testing.assert_array_equal(self.numpy(function(x, power=2)), [4, 9])
        assert function._cache_size() == 1
        program = jax.make_jaxpr(lambda x: function(x, power=2))(x)
        assert "pjit" not in str(program)  # inside another program it leaves no trace


class TestLargest:
    """The largest numbers of a row, found without sorting on JAX and TensorFlow."""

    @pytest.fixture
    def rows(self):
        rows = np.random.default_rng(0).normal(0, 2, (5, 700)).astype("float32")
        rows[0] = -np.abs(rows[0])
        rows[1] = np.round(rows[1], 1)  # many are equal
        rows[2, 10:] = -np.inf
        rows[3] *= 1e30
        rows[4, :4] = [0.0, -0.0, 1e-40, np.inf]
        return rows

    @pytest.mark.parametrize("k", [1, 2, 5, 400, 699, 700, 5000])
    def test_kth(self, rows, k):
        found = backend.kth_largest(ops.convert_to_tensor(rows), ops.convert_to_tensor(float(k)))
        np.testing.assert_array_equal(ops.convert_to_numpy(found), np.sort(rows)[:, ::-1][:, min(k, 700) - 1, None])

    @pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9, 0.99])
    def test_smallest_kept(self, rows, share):
        rows = rows[:3]
        weights = np.exp(rows - rows.max(-1, keepdims=True))
        limits = share * weights.sum(-1, keepdims=True)
        arrays = (ops.convert_to_tensor(array) for array in (rows, weights, limits))
        found = ops.convert_to_numpy(backend.smallest_kept(*arrays))
        for row, weight, limit, smallest in zip(rows, weights.astype("float64"), limits, found, strict=True):
            above = np.array([weight[row > number].sum() for number in row])
            assert smallest == row[above < limit].min()

    def test_argmax(self):
        rows = [[1, 3, 3], [np.nan, 1, 2], [np.nan] * 3, [-np.inf] * 3, [1, np.inf, 2], [-np.inf, -2, -1]]
        found = backend.argmax(ops.convert_to_tensor(np.array(rows, "float32")))
        assert ops.convert_to_numpy(found).tolist() == [1, 3, 3, 3, 3, 2]


class TestCompileFunction:
    def test_reads_variables_at_each_call(self):
        import keras

        variable = keras.Variable(2.0)
        function = backend.compile_function(lambda x: x * variable, [variable])
        one = ops.convert_to_tensor(1.0)
        assert float(function(one)) == 2
        variable.assign(5.0)
        assert float(function(one)) == 5
