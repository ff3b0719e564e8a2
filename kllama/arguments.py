"""Checks of single arguments, with one wording everywhere: the argument, the value received, what is allowed."""

from collections.abc import Callable
from numbers import Integral, Real


def check_integer(name: str, value, minimum: int) -> None:
    """Raise a TypeError unless `value` is an integer (True and False are none), a ValueError if it is too small."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} ({value!r}) must be an integer.")
    if value < minimum:
        raise ValueError(f"{name} ({value}) must be at least {minimum}.")


def check_number(name: str, value, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """Raise a TypeError unless `value` is a number, a ValueError unless it is allowed (`allowed` says what is)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} ({value!r}) must be a number.")
    if not is_allowed(value):
        raise ValueError(f"{name} ({value}) must be {allowed}.")


def check_flag(name: str, value) -> None:
    """Raise a TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} ({value!r}) must be True or False.")
