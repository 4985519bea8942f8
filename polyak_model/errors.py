"""Checks of arguments, with messages that name what was expected and received."""

import math
import numbers


class InputError(ValueError):
    """Invalid input of a command. The message is one printable line and says how to fix it.

    Args:
        message: A string. Characters that could control a terminal, which may
            come from a file, are escaped.

    Example:

    >>> print(InputError("the layer \\x1b[2J"))
    the layer \\x1b[2J
    """

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text):
    """Escapes unprintable characters, such as those that control a terminal.

    Example:

    >>> printable("Schicht 1"), printable("\\x1b[2J\\n")
    ('Schicht 1', '\\\\x1b[2J\\\\n')
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_number(value):
    """Returns whether `value` is a real number other than a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_decay(decay):
    """Returns `decay` as a float, or raises `ValueError`."""
    if not is_number(decay) or not 0 <= decay < 1:
        raise ValueError(
            f"`decay` must be a number in [0, 1). Received: decay={decay!r}. "
            "For the plain mean use UniformAverage()."
        )
    return float(decay)


def check_exponent(name, value):
    """Returns `value` as a float, or raises `ValueError`."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            f"`{name}` must be a finite number of at least 0. Received: {name}={value!r}. "
            "0 is the uniform mean; a larger value gives less weight to early iterates."
        )
    return float(value)


def check_positive(name, value, meaning):
    """Returns `value` as a float, or raises `ValueError`."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"`{name}`, {meaning}, must be a positive finite number. Received: {name}={value!r}."
        )
    return float(value)


def check_integer(name, value, at_least, counts="optimizer steps"):
    """Returns `value` as an int, or raises `ValueError`."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < at_least:
        raise ValueError(
            f"`{name}` counts {counts}: it must be an int of at least {at_least}. "
            f"Received: {name}={value!r}."
        )
    return int(value)


def check_choice(name, value, choices):
    """Returns `value`, one of the strings `choices`, or raises `ValueError`."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {expected}. Received: {name}={value!r}.")
    return value
