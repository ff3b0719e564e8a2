"""Scripts in KerasHub's own style run on kllama with their import changed, and give what KerasHub gives.

Each script in `scripts/` is run twice: as it stands, and with `keras_hub` replaced in its imports. It finds the presets
`PRESET` and `LLAMA3_PRESET`, an adapter `LORA` and an empty folder `SCRATCH`, and leaves what it found in `results`.
"""

import re
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

import kllama

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))

DRAWS = "Sampled tokens are other draws"
LOSS = "The loss is not diluted by padding"
PADDING = "What stands at padding is another number"
COMPILED = "A `.keras` file keeps what `compile` was given"

# What a script finds that falls under a row of the table in docs/from-kerashub.md: equal in kind, not in value.
DIFFERENCES = {
    "fit_on_strings": {"default loss": LOSS},
    "load_and_summary": {"logits at padding": PADDING},
    "samplers": {name: DRAWS for name in ("random", "top_k", "top_p", "TopPSampler")},
    "save_and_load": {"optimizer of a keras file": COMPILED},
}

# Floats may be this far apart. An activation that is rounded to int8 turns its last bit into a whole step.
TOLERANCES = {"int8": 2e-2}
TOLERANCE = 1e-4


def change_import(source: str) -> str:
    """Write kllama where a script imports KerasHub."""
    source = re.sub(r"^from keras_hub\.", "from kllama.", source, flags=re.MULTILINE)
    return re.sub(r"^import keras_hub$", "import kllama as keras_hub", source, flags=re.MULTILINE)


def run(path: Path, source: str, **variables) -> dict:
    """Run the text of a script, and give what it left in `results`."""
    keras.backend.clear_session()
    names = {"__name__": path.stem, **variables}
    exec(compile(source, str(path), "exec"), names)
    return names["results"]


def describe(value) -> str:
    """What kind of value it is: of arrays and numbers the type and the shape, of lists what each element is."""
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}[{', '.join(describe(item) for item in value)}]"
    return type(value).__name__


def same(ours, theirs, tolerance: float = TOLERANCE) -> bool:
    """Whether two values of one kind are equal: floats within the tolerance, all else exactly."""
    if isinstance(ours, list | tuple):
        return all(same(*pair, tolerance) for pair in zip(ours, theirs, strict=True))
    if isinstance(ours, float) or (isinstance(ours, np.ndarray | np.generic) and ours.dtype.kind == "f"):
        return bool(np.allclose(ours, theirs, rtol=tolerance, atol=tolerance))
    return bool(np.all(ours == theirs))


def show_difference(ours, theirs) -> str:
    """Say in what two values of one kind differ."""
    if isinstance(ours, np.ndarray) and ours.dtype.kind == "f":
        return f"the numbers are up to {np.abs(ours - theirs).max()} apart"
    return f"kllama {ours!r}, KerasHub {theirs!r}"


def compare(ours: dict, theirs: dict, differing: dict, tolerance: float = TOLERANCE) -> list[str]:
    """List in what two runs of a script differ though no named difference covers it."""
    faults = [f"{key}: found by one library alone" for key in sorted(ours.keys() ^ theirs.keys())]
    for key in sorted(ours.keys() & theirs.keys()):
        kinds = describe(ours[key]), describe(theirs[key])
        if kinds[0] != kinds[1]:
            faults.append(f"{key}: kllama {kinds[0]}, KerasHub {kinds[1]}")
        elif key not in differing and not same(ours[key], theirs[key], tolerance):
            faults.append(f"{key}: {show_difference(ours[key], theirs[key])}")
    return faults


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_on_both(path, llama_preset, llama3_preset, lora_file, tmp_path):
    source = path.read_text(encoding="utf-8")
    changed = change_import(source)
    results = []
    for library, text in (("keras_hub", source), ("kllama", changed)):
        (tmp_path / library).mkdir()
        variables = {"PRESET": llama_preset, "LLAMA3_PRESET": llama3_preset, "LORA": lora_file}
        results.append(run(path, text, SCRATCH=str(tmp_path / library), **variables))
    differing = DIFFERENCES.get(path.stem, {})
    assert differing.keys() <= results[0].keys()
    assert compare(results[1], results[0], differing, TOLERANCES.get(path.stem, TOLERANCE)) == []


def test_keras_hub_reads_an_adapter_that_kllama_saved(llama3_preset, tmp_path):
    ours = kllama.models.Llama3Backbone.from_preset(llama3_preset)
    ours.enable_lora(rank=2)
    generator = np.random.default_rng(4)
    for variable in ours.trainable_weights:
        variable.assign(generator.normal(0, 0.3, variable.shape).astype("float32"))
    ours.save_lora_weights(str(tmp_path / "model.lora.h5"))
    theirs = keras_hub.models.Llama3Backbone.from_preset(llama3_preset)
    theirs.load_lora_weights(str(tmp_path / "model.lora.h5"))
    inputs = {"token_ids": np.arange(8)[None], "padding_mask": np.ones((1, 8), "int32")}
    assert same(*(keras.ops.convert_to_numpy(backbone(inputs)) for backbone in (ours, theirs)))


def test_the_comparison_can_fail():
    kept = {"list": ["a", 1, 2.0], "array": np.ones(2, "float32")}
    assert compare(kept, {"list": ["a", 1, 2.00001], "array": np.ones(2, "float32")}, {}) == []
    changes = {
        "another text": {**kept, "list": ["b", 1, 2.0]},
        "another number": {**kept, "list": ["a", 1, 2.001]},
        "another type": {**kept, "list": ["a", 1.0, 2.0]},
        "another dtype": {**kept, "array": np.ones(2, "float64")},
        "another shape": {**kept, "array": np.ones(3, "float32")},
        "a key too few": {"list": kept["list"]},
    }
    assert [len(compare(changed, kept, {})) for changed in changes.values()] == [1] * len(changes)
    differing = {"list": DRAWS, "array": DRAWS}
    assert [len(compare(changed, kept, differing)) for changed in changes.values()] == [0, 0, 1, 1, 1, 1]
