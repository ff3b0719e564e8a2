"""Shared fixtures. `KERAS_BACKEND` chooses the backend of a run, and `python -m tests` runs the suite on all three.

With `WITHOUT_TENSORFLOW=1` a run cannot import TensorFlow, and what needs it skips.
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import pytest

if os.environ.get("WITHOUT_TENSORFLOW"):
    from tests.blocking import block_tensorflow

    block_tensorflow()

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models, tokenizers and recorded outputs that lies beside a checkout."""
    if not ASSETS.is_dir():
        pytest.skip(f"the test data is not at {ASSETS}")
    return ASSETS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests that do not depend on the backend to the jax run, and those of one backend to its run."""
    backend = os.environ["KERAS_BACKEND"]

    def is_elsewhere(item: pytest.Item) -> bool:
        only = item.get_closest_marker("only_on")
        return (only is not None and backend not in only.args) or (
            backend != "jax" and item.get_closest_marker("backend_independent") is not None
        )

    deselected = [item for item in items if is_elsewhere(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
