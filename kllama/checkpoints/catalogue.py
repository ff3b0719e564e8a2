"""The built-in presets: which there are, and where they lie.

Each is a folder of `presets/` with everything in it, weights too. An installed kllama carries `presets/` inside the
package; a source checkout has it beside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def builtin_presets() -> dict[str, Path]:
    """Give the folder of each built-in preset by name."""
    installed, checkout = _PACKAGE / "presets", _PACKAGE.parent / "presets"
    folder = installed if installed.is_dir() else checkout
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
