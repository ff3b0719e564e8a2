"""The samplers of KerasHub, which `compile` takes, so that a script need not import two libraries."""

import keras_hub.samplers
from keras_hub.samplers import *  # noqa: F403

__all__ = [name for name in dir(keras_hub.samplers) if callable(getattr(keras_hub.samplers, name)) and name[0] != "_"]
