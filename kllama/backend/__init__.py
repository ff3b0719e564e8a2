"""The one door to the frameworks: a small set of primitives with the same signature on JAX, TensorFlow and PyTorch.

`core/` is written over these names and over plain operators (`+`, `*`, `&`, slicing), which every framework's arrays
understand. Only the files of this folder import a framework. The primitives take and give the framework's own arrays,
never `keras.Variable` and never symbolic tensors: Keras runs a layer's `call` on real arrays or tracers. One name may
be None: `fused_attention`, where a framework has none with grouped heads.
"""

import keras

_NAME = keras.config.backend()

if _NAME == "jax":
    from kllama.backend.jax import *  # noqa: F403
elif _NAME == "tensorflow":
    from kllama.backend.tensorflow import *  # noqa: F403
elif _NAME == "torch":
    from kllama.backend.torch import *  # noqa: F403
else:
    raise ImportError(f"KERAS_BACKEND = {_NAME!r}; expected 'jax', 'tensorflow' or 'torch'.")
