"""The exceptions that kllama raises for what it is given: files, memory, and numbers.

A wrong *argument* is a plain `ValueError` or `TypeError`; a wrong *file* is one of the classes here. Each also derives
from the built-in exception that a caller would think of first, so `except FileNotFoundError` works as expected.

Messages read `<file or argument>: <field> = <received>; expected <allowed>. <what to do next>`.
"""

import errno


class KllamaError(Exception):
    """Base class of every exception that kllama defines."""


class CheckpointError(KllamaError, ValueError):
    """A file is wrong, damaged, ambiguous or hostile."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file or a directory is not there."""

    def __init__(self, message: str, filename: str | None = None):
        # OSError fills these only when it is given two arguments.
        super().__init__(message)
        self.errno = errno.ENOENT
        self.filename = filename

    def __str__(self):
        # OSError would print errno and filename instead of the message.
        return self.args[0]


class UnsupportedError(CheckpointError):
    """The file is valid, but kllama does not implement what it asks for."""


class ResourceError(KllamaError, MemoryError, OSError):
    """Memory, disk, input/output, network or a lock was not to be had."""


class NonFiniteError(KllamaError, ArithmeticError):
    """A NaN or an infinity appeared where only finite numbers make sense."""
