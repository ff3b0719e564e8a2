"""The Keras layers of a Llama: they hold the variables and call the maths of `kllama.core`. One public layer a file."""
