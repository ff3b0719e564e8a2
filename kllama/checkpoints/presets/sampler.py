"""The `sampler` of a preset's `task.json`: a name, or one of KerasHub's samplers as Keras serializes it.

Rebuilds what it read from a closed table, so that a preset cannot name a class to import. Making a sampler of it is for
`models/`.
"""

from collections.abc import Iterable
from pathlib import Path

from kllama.checkpoints.files.reader import shown
from kllama.checkpoints.presets.fields import COUNT, FLAG, NUMBER, OBJECT, STRING, Kind, read_fields
from kllama.errors import CheckpointError, UnsupportedError

_FORM = {
    "module": STRING.or_null().since(None),
    "class_name": STRING,
    "config": OBJECT,
    "registered_name": STRING.or_null().since(None),
}
_TEMPERATURE = NUMBER.since(1.0)
_SEED = Kind("an integer of at least 0", lambda value: type(value) is int and value >= 0).or_null().since(None)
# What `get_config` of each class writes, and what it is taken to be where a caller's own form leaves it out.
_SAMPLERS = {
    "greedy": ("GreedySampler", {"temperature": _TEMPERATURE}),
    "random": ("RandomSampler", {"temperature": _TEMPERATURE, "seed": _SEED}),
    "top_k": ("TopKSampler", {"temperature": _TEMPERATURE, "k": COUNT.or_null().since(5), "seed": _SEED}),
    "top_p": (
        "TopPSampler",
        {"temperature": _TEMPERATURE, "p": NUMBER.since(0.1), "k": COUNT.or_null().since(None), "seed": _SEED},
    ),
    "beam": (
        "BeamSampler",
        {"temperature": _TEMPERATURE, "num_beams": COUNT.since(5), "return_all_beams": FLAG.since(False)},
    ),
    "contrastive": (
        "ContrastiveSampler",
        {"temperature": _TEMPERATURE, "k": COUNT.since(5), "alpha": NUMBER.since(0.6)},
    ),
}
SAMPLER_NAMES = tuple(sorted((*_SAMPLERS, "speculative")))
"""The samplers that KerasHub knows by name."""

_NAMES = ("auto", *SAMPLER_NAMES)
_CLASSES = {f"keras_hub>{name}": fields for name, fields in _SAMPLERS.values()}


def read_sampler(path: Path, sampler: object) -> str | dict:
    """Read the `sampler` of a task's config.

    Args:
        path: the file, for messages.
        sampler: a name, or a serialized sampler.

    Returns:
        The name, or a dict with the `class_name` and the `config` of a sampler, for `keras_hub.samplers.get`.

    Raises:
        UnsupportedError: a sampler that is not KerasHub's own.
        CheckpointError: neither form, or fields that the sampler does not have.
    """
    if isinstance(sampler, str):
        _check_known(path, sampler, sampler, _NAMES)
        return sampler
    if not isinstance(sampler, dict):
        raise CheckpointError(f"{path}: sampler = {shown(sampler)}; expected a name or an object.")
    source = f"{path}: sampler"
    form = read_fields(source, sampler, _FORM)
    # A class of the caller's may be called as KerasHub's is; the registered name tells them apart.
    name = form["class_name"] if form["registered_name"] is None else form["registered_name"]
    if name in _SAMPLERS:
        name = f"keras_hub>{_SAMPLERS[name][0]}"
    _check_known(path, sampler, name, _CLASSES)
    return {"class_name": name, "config": read_fields(source, form["config"], _CLASSES[name])}


def _check_known(path: Path, sampler: object, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UnsupportedError(
            f"{path}: sampler = {shown(sampler)}; expected {' or '.join(known)}. To use another one, pass sampler= to "
            "from_preset."
        )
