"""The presets that have a name: those whose files come with kllama, and those that are on Kaggle.

An installed kllama carries `presets/` inside the package; a source checkout has it beside the package. A folder there
is a preset, weights and all. `catalogue.json` lists KerasHub's presets of Llama and Llama 3, with their handles. This
file downloads nothing: `presets/kaggle.py` does.
"""

import json
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def builtin_presets() -> dict[str, Path]:
    """Give the folder of each built-in preset by name."""
    return {path.parent.name: path.parent for path in sorted(_folder().glob("*/config.json"))}


def kaggle_presets() -> dict[str, dict]:
    """Give `kaggle_handle`, `params` (their number) and `description` of each preset on Kaggle by name."""
    file = _folder() / "catalogue.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def keras_hub_entries() -> dict[str, dict]:
    """Give all presets by name, in the form in which KerasHub registers those of a class."""
    builtin = {name: {"kaggle_handle": str(path)} for name, path in builtin_presets().items()}
    return builtin | {
        name: {
            "metadata": {"description": preset["description"], "params": preset["params"]},
            "kaggle_handle": preset["kaggle_handle"],
        }
        for name, preset in kaggle_presets().items()
    }


def _folder() -> Path:
    installed, checkout = _PACKAGE / "presets", _PACKAGE.parent / "presets"
    return installed if installed.is_dir() else checkout
