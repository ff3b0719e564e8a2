"""Rounding lengths up, so that nearby ones share a compiled program."""


def bucket(length: int, smallest: int = 16) -> int:
    """Round a length up to 16, 32, 64, 128, and from there to four sizes an octave: 160, 192, 224, 256, 320, ..."""
    octave = 1 << max(length - 1, smallest - 1).bit_length()
    step = octave if octave <= 128 else octave // 8
    return -(-length // step) * step
