"""Saves of real models under fire: killed at random moments, read meanwhile, by two at a time, on a full disk.

The savers are forks of this process, so only PyTorch runs them: JAX and TensorFlow have threads that a fork lacks.
`python -m pytest tests/models/test_saves.py -m slow` kills a thousand.
"""

import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import kllama
from kllama.checkpoints.files import manifest, writer
from kllama.checkpoints.files.workspace import recover
from kllama.checkpoints.formats import open_checkpoint, open_tokenizer
from kllama.errors import CheckpointError, ResourceError
from tests.letters import letters

pytestmark = pytest.mark.only_on("torch")  # only a process with PyTorch can be forked

SHARDS = 0.00002  # GB
few_or_many = pytest.mark.parametrize("count", [3, pytest.param(143, marks=pytest.mark.slow)], ids=["few", "many"])


def build(seed: int) -> kllama.LlamaCausalLM:
    keras.utils.set_random_seed(seed)
    backbone = kllama.LlamaBackbone(64, 2, 2, 32, 64, 1, rope_max_wavelength=10000 + seed, max_sequence_length=32)
    return kllama.LlamaCausalLM(backbone, kllama.LlamaCausalLMPreprocessor(letters(), 8 + seed))


@pytest.fixture(scope="module")
def models() -> list[kllama.LlamaCausalLM]:
    """Two models, each of which differs from the other in every file but the tokenizer's."""
    return [build(0), build(1)]


def contents(model) -> dict:
    """What the files of a model have to say."""
    weights = {weight.path: keras.ops.convert_to_numpy(weight).tobytes() for weight in model.backbone.weights}
    return {"theta": model.backbone.rope_max_wavelength, "length": model.preprocessor.sequence_length, **weights}


def stored(path: Path) -> dict:
    """What the files of a preset say."""
    checkpoint = open_checkpoint(path)
    weights = {name: array.tobytes() for name, array in checkpoint.tensors()}
    theta = checkpoint.backbone_config["rope_max_wavelength"]
    return {"theta": theta, "length": checkpoint.preprocessor_config["sequence_length"], **weights}


def find(path: Path, models) -> int:
    """Which of the models is there, whole."""
    manifest.verify(path)
    return [contents(model) for model in models].index(stored(path))


@contextmanager
def forked(work: Callable[[], None]):
    """Do something in a child process, over and over, until the child is killed at the end of the block."""
    starts, started = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(started, b"!")
            while True:
                work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.read(starts, 1)
    os.close(starts), os.close(started)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"


def check_leftovers(folder: Path) -> int:
    """Nothing that a dead saver left may load."""
    left = list(folder.glob(".*.saving-*/*/*"))
    for path in left:
        for opened in (open_checkpoint, open_tokenizer):
            with pytest.raises(CheckpointError, match="interrupted save"):
                opened(path)
    return len(left)


def kill_savers(folder: Path, count: int, save: Callable[[int], None], check: Callable[[], int]) -> Counter:
    """Kill savers of two things in turn at random moments, and count which of them is there afterwards.

    Args:
        folder: where they save.
        count: how many are killed.
        save: saves the first thing or the second.
        check: finds out which is there, and that it is whole.
    """

    def save_both():
        save(1), save(0)

    rng, found = random.Random(0), Counter()
    save_both()
    start = time.perf_counter()
    save_both()
    period = time.perf_counter() - start
    for _ in range(count):
        with forked(save_both):
            time.sleep(rng.uniform(0, 4 * period))
        found["left behind"] += check_leftovers(folder)
        found[check()] += 1
    save(0)
    assert check() == 0 and not list(folder.glob(".*"))  # the next save tidies up
    return found


# Killed


@pytest.mark.parametrize(
    ("shards", "swaps"),
    [((None, None), True), ((SHARDS, SHARDS), True), ((None, SHARDS), True), ((None, None), False)],
    ids=["one file", "shards", "one file, then shards", "in two steps"],
)
@few_or_many
def test_savers_of_presets(tmp_path, models, monkeypatch, count, shards, swaps):
    if not swaps:
        monkeypatch.setattr(writer, "exchange", lambda *_: False)
    path = tmp_path / "preset"

    def save(number):
        models[number].save_to_preset(str(path), max_shard_size=shards[number])

    def check():
        assert recover(path)
        return find(path, models)

    print(kill_savers(tmp_path, count, save, check))


@few_or_many
def test_savers_of_parts(tmp_path, models, count):
    path = tmp_path / "preset"
    pairs = [(theta, length) for theta in models for length in models]
    expected = [{**contents(model), "length": other.preprocessor.sequence_length} for model, other in pairs]

    def save(number):
        models[number].backbone.save_to_preset(str(path))
        models[number].preprocessor.save_to_preset(str(path))

    def check():
        manifest.verify(path)
        return expected.index(stored(path))

    print(kill_savers(tmp_path, count, save, check))


@pytest.mark.parametrize("kind", ["adapter.lora.h5", "model.gguf"])
@pytest.mark.filterwarnings("ignore:preprocessor = None")
@few_or_many
def test_savers_of_files(tmp_path, kind, count):
    path = tmp_path / kind
    models = [kllama.LlamaCausalLM(build(seed).backbone) for seed in range(2)]
    for seed, model in enumerate(models):
        model.backbone.enable_lora(2)
        for weight in model.backbone.trainable_weights:
            weight.assign(np.random.default_rng(seed).normal(size=weight.shape))

    def save(number):
        if kind.endswith("h5"):
            models[number].backbone.save_lora_weights(str(path))
        else:
            models[number].export_gguf(path, overwrite=True)

    whole = []
    for number in range(2):
        save(number)
        whole.append(path.read_bytes())
    assert whole[0] != whole[1]
    print(kill_savers(tmp_path, count, save, lambda: whole.index(path.read_bytes())))


# Others meanwhile


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "in two steps"])
@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"])
def test_who_reads_during_saves_gets_one_of_them(tmp_path, models, monkeypatch, count, swaps):
    if not swaps:
        monkeypatch.setattr(writer, "exchange", lambda *_: False)
    path = str(tmp_path / "preset")
    models[0].save_to_preset(path)
    expected = [contents(model) for model in models]

    def save_both():
        for model, shards in ((models[1], SHARDS), (models[0], None)):
            model.save_to_preset(path, max_shard_size=shards)
            time.sleep(0.05)

    found = Counter()
    with forked(save_both):
        for _ in range(count):
            found[expected.index(contents(kllama.LlamaCausalLM.from_preset(path)))] += 1
    print(found)


@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"])
def test_two_savers_at_a_time(tmp_path, models, count):
    path = tmp_path / "preset"
    models[0].save_to_preset(str(path))
    first = forked(lambda: models[0].save_to_preset(str(path)))
    second = forked(lambda: models[1].save_to_preset(str(path), max_shard_size=SHARDS))
    with first, second:
        for _ in range(count):
            time.sleep(0.05)
            assert path.is_dir()
    find(path, models)
    models[1].save_to_preset(str(path))
    assert find(path, models) == 1 and os.listdir(tmp_path) == ["preset"]


# A full disk


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # h5py, which tries again as it goes
@pytest.mark.parametrize("shards", [None, SHARDS])
def test_files_that_must_not_grow(tmp_path, models, shards):
    path = tmp_path / "preset"
    models[0].save_to_preset(str(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        with pytest.raises(ResourceError, match=r"File too large.* \d+ bytes are needed, \d+ bytes are free"):
            models[1].save_to_preset(str(path), max_shard_size=shards)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find(path, models) == 0 and os.listdir(tmp_path) == ["preset"]


def test_a_disk_that_is_too_small(tmp_path, models, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for part in (models[0], models[0].backbone):
        with pytest.raises(ResourceError, match=r"needs \d+ bytes, and 1000 are free"):
            part.save_to_preset(str(tmp_path / "preset"))
    assert not os.listdir(tmp_path)
