"""The wheel holds everything that the installed package needs, the embedded preset too."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("kllama-*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "kllama/presets/stories_1m_en/model.weights.h5" in names and "kllama/py.typed" in names
    files = (path for path in (ROOT / "kllama").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)  # the chat templates are no Python
    assert {name.split("/")[0] for name in names} == {"kllama", names[-1].split("/")[0]}
    assert wheel.stat().st_size < 10e6


def test_the_installed_package_writes_a_story(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # Only the unpacked wheel: the checkout is neither the working directory nor on the path.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "KERAS_BACKEND": "jax"}
    code = "import sys; from kllama.cli import main; sys.exit(main())"
    arguments = ["generate", "--temperature", "0", "--max-new-tokens", "20", "Once upon a time"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Once upon a time") and len(result.stdout) > 40
