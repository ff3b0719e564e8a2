"""Presets on Kaggle: a handle to a folder on this machine, downloaded once by the `kagglehub` package.

What is in the folder is checked by whoever opens it. Called by `formats.py`, for handles and catalogue names alone.
"""

import re
from pathlib import Path

from kllama.errors import MissingFileError, ResourceError

PREFIX = "kaggle://"
_HANDLE = re.compile(rf"{PREFIX}\w[\w.-]*(/\w[\w.-]*){{3}}(/\d+)?", re.ASCII)


def download(handle: str) -> Path:
    """Return the folder of a preset, which is downloaded as a whole unless it has been before.

    Args:
        handle: `kaggle://{owner}/{model}/{framework}/{variation}`, with `/{version}` or for the newest one.

    Raises:
        ValueError: the handle has another form.
        MissingFileError: Kaggle has no such preset.
        ResourceError: no network, no permission, or no `kagglehub`.
    """
    if not _HANDLE.fullmatch(handle):
        raise ValueError(
            f"{handle}: no Kaggle handle; expected kaggle://owner/model/framework/variation, with /version or without."
        )
    try:
        # Imported here: it is slow to import, and few need it.
        import kagglehub
    except ImportError as error:
        raise ResourceError(
            f"{handle}: kagglehub cannot be imported ({error}). Run `pip install kagglehub`."
        ) from error
    try:
        return Path(kagglehub.model_download(handle.removeprefix(PREFIX)))
    except Exception as error:  # of requests, of kagglehub's own, and of the disk: they have no base in common
        raise _translated(handle, error) from error


def _translated(handle: str, error: Exception) -> Exception:
    """Say in one line what went wrong, and what to do."""
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    if status == 404:
        return MissingFileError(
            f"{handle}: Kaggle has no such preset (404). Check the spelling and the version.", handle
        )
    if status in (401, 403):
        return ResourceError(
            f"{handle}: Kaggle refuses access ({status}). Accept the terms of the model on kaggle.com, and call "
            "kagglehub.login()."
        )
    reason = " ".join(str(error).split())
    return ResourceError(
        f"{handle}: the download failed ({type(error).__name__}: {reason[:300]}). Check the network, or download the "
        "preset elsewhere and pass its folder."
    )
