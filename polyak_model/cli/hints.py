"""What to do after averaging, and lists of names that fit in a line."""

from polyak_model.errors import printable


def abridge(names):
    """Returns the first two of several names, and the number of the others.

    Args:
        names: List of strings.

    Example:

    >>> abridge(["a", "b", "c", "d"])
    'a, b and 2 more'
    """
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return printable(", ".join(names[:2]) + more)


def refresh_hint(layers):
    """Returns the advice to refresh the statistics of BatchNormalization layers.

    Args:
        layers: List of their names.
    """
    return (
        f"BatchNormalization: the averaged statistics of {abridge(layers)} do not match the "
        "averaged weights. Refresh them: load the model and call "
        "`polyak_model.refresh_statistics(model, data)` with training data, or pass --refresh."
    )
