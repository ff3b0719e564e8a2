"""The README's commands are the ones that are run, and its Python runs as it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.backend_independent

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks in one language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fences if name == language]


def test_the_first_two_commands_are_one_line_each_and_set_up_what_they_need():
    story, tests = (block.splitlines() for block in blocks("sh")[:2])
    assert len(story) == len(tests) == 1
    assert story[0].startswith("python3 -m venv ") and story[0].endswith('kllama generate "Once upon a time"')
    assert tests[0].startswith("python3 -m venv --clear ") and tests[0].endswith(" -m tests")


def test_ci_runs_the_test_command(tmp_path):
    """`.ci/run`, with a Python that only writes down how it is called, and fails."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho "$0 $@" | sed "s|.*/||" > {tmp_path}/call\nexit 7\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env=environment, timeout=60)
    assert result.returncode == 7
    assert (tmp_path / "call").read_text().strip() == blocks("sh")[1].split(" && ")[0]


def test_the_extras_and_the_command_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in set(re.findall(r"\[(\w+)\]\"", "".join(blocks("sh")) + README)):
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra
    assert 'kllama = "kllama.cli:main"' in project


def test_the_rooms_are_the_ones_that_exist():
    (tree,) = blocks("")
    named = set(re.findall(r"^    (?:    )?(\w+)/ ", tree, flags=re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "kllama").glob("*/**/*.py")}


def test_python_and_command_blocks_run(tmp_path, assets):
    """One after another, in one folder: the commands are for what the Python saved."""
    shutil.copytree(assets / "models" / "stories260K", tmp_path / "path" / "to" / "llama")
    commands = [shlex.split(line)[1:] for block in blocks("sh")[2:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["convert", "inspect", "verify"]
    code = [*blocks("python"), "from kllama.cli import main", f"assert not any(map(main, {commands}))"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Once upon a time") == 4
    assert "llama.gguf: GGUF" in result.stdout and "my_stories: kllama preset" in result.stdout
