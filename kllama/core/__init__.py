"""The maths of a Llama, once: pure functions over arrays, written over the primitives of `kllama.backend`.

`layers/` calls them with Keras layers as the projections; whoever decodes over raw tensors calls the same functions
with other projections. Nothing here holds state, knows Keras layers, or asks which backend runs.
"""
