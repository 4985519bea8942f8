"""How a file is refused: in one line, whatever a library raised."""

import errno

from polyak_model.errors import InputError

# What h5py, HDF5 and NumPy raise on damaged files.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def refusal(source, problem, remedy="Save the weights again with Keras"):
    """Returns the `InputError` that says why a file is not used."""
    return InputError(f"Cannot use {str(source)!r}: {problem}. {remedy}.")


def system_error(source, error):
    """Returns the `InputError` for a file that the system does not open."""
    remedy = "Check the path"
    if getattr(error, "errno", None) == errno.EMFILE:
        remedy = "Raise the limit with ulimit -n, or average the averages of fewer files"
    reason = getattr(error, "strerror", None) or in_one_line(error)
    return refusal(source, f"the system says: {reason}", remedy)


def in_one_line(error):
    """Returns the message of an exception as one line of bounded length.

    Example:

    >>> in_one_line(OSError("no data.\\n  at all"))
    'no data. at all'
    """
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
