"""Which weights of a model are not averaged."""

import re

import keras


def check_exclude(exclude):
    """Returns the argument `exclude` of `PolyakModel`, or raises `ValueError`.

    Args:
        exclude: None, a regular expression, a list of them, or a callable. In a
            file it is the list of positions in `model.weights`.
    """
    patterns = [exclude] if isinstance(exclude, str) else exclude
    if exclude is None or callable(exclude):
        return exclude
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(pattern, (str, int)) for pattern in patterns
    ):
        raise ValueError(
            "`exclude` must be a regular expression for paths of variables, a list of them, or a "
            f"callable from a variable to a bool. Received: exclude={exclude!r}."
        )
    for pattern in patterns:
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise ValueError(
                f"`exclude` must be a regular expression. Received: {pattern!r}, which is none: "
                f"{error}."
            ) from error
    return list(patterns)


def find_excluded(exclude, weights, shared=()):
    """Returns the positions of the weights that are not averaged, a list.

    Args:
        exclude: See `check_exclude`.
        weights: The weights of the raw model.
        shared: Those that are not averaged anyway, since they are frozen.

    Raises:
        ValueError: If it matches no weight, or every float weight.
    """
    if exclude is None:
        return []
    found = [i for i, weight in enumerate(weights) if _matches(exclude, i, weight)]
    left = set(map(id, shared))
    floats = {
        i
        for i, weight in enumerate(weights)
        if id(weight) not in left and keras.backend.is_float_dtype(weight.dtype)
    }
    if not found or floats <= set(found):
        paths = [weight.path for weight in weights]
        shown = ", ".join(paths[:5]) + ", ..." * (len(paths) > 5)
        raise ValueError(
            f"`exclude` must match some weights and leave others to be averaged. Received: "
            f"exclude={exclude!r}, which matches {len(found)} of {len(paths)}. A pattern must "
            f"match a whole path. The paths are {shown}."
        )
    return found


def _matches(exclude, position, weight):
    if callable(exclude):
        return bool(exclude(weight))
    return any(
        each == position if isinstance(each, int) else re.fullmatch(each, weight.path)
        for each in exclude
    )
