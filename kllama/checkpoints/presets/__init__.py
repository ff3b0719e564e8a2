"""Preset directories, kllama's and KerasHub's: Keras configurations and HDF5 weights."""
