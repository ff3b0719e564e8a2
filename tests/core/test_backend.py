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


class TestUniform:
    def draw(self, seed, step, size=(3, 50)):
        like = ops.zeros((1,))
        seed, step = (ops.convert_to_tensor(np.int32(x)) for x in (seed, step))
        return ops.convert_to_numpy(backend.uniform(seed, step, size, like))

    def test_range(self):
        noise = self.draw(5, 7, (100, 1000))
        assert noise.dtype == "float32" and noise.shape == (100, 1000)
        assert 0 <= noise.min() < 1e-3 and 1 - 1e-3 < noise.max() < 1
        assert noise.mean() == pytest.approx(0.5, abs=0.01) and noise.var() == pytest.approx(1 / 12, abs=0.01)

    @pytest.mark.parametrize("seed, step", [(0, 0), (1, 2), (2**31 - 1, 2**31 - 1)])
    def test_depends_on_seed_and_step_alone(self, seed, step):
        first = self.draw(seed, step)
        self.draw(3, 4)
        np.random.rand()
        np.testing.assert_array_equal(self.draw(seed, step), first)

    def test_each_seed_and_each_step_draws_anew(self):
        pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (1, 2), (2**31 - 1, 0), (0, 2**31 - 1)]
        draws = [self.draw(*pair) for pair in pairs]
        for i, one in enumerate(draws):
            for other in draws[:i]:
                assert (one == other).mean() < 0.01


class TestCompileFunction:
    def test_reads_variables_at_each_call(self):
        import keras

        variable = keras.Variable(2.0)
        function = backend.compile_function(lambda x: x * variable, [variable])
        one = ops.convert_to_tensor(1.0)
        assert float(function(one)) == 2
        variable.assign(5.0)
        assert float(function(one)) == 5
