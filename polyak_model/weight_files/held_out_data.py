"""Held-out data of the user, checked."""

import itertools
import os

import numpy as np

from polyak_model.errors import InputError
from polyak_model.weight_files.npz import ArraysError, read_arrays

_EXAMPLE = "numpy.savez(file, x=inputs, y=targets)"


def load_held_out(path):
    """Loads inputs and targets.

    Args:
        path: An .npz file with the arrays `x` and `y`, whose first axes are the
            examples; for a model with several inputs or outputs `x0`, `x1` and
            so on, in the order of the model.

    Returns:
        Tuple `(x, y)` of arrays; a list of arrays in place of one that is
        numbered.

    Raises:
        InputError: If the file cannot be used.
    """
    try:
        arrays = read_arrays(path, _EXAMPLE)
        named = {letter: _pick(arrays, letter) for letter in "xy"}
        _check({name: array for own in named.values() for name, array in own.items()})
    except ArraysError as error:
        raise InputError(
            "`--data` must be an .npz file of held-out data with arrays `x` and `y`, or `x0`, `x1` "
            "and so on for several inputs. "
            f"Received: {os.fspath(path)!r}, {error.problem}. {error.remedy}."
        ) from error
    return tuple(own.get(letter, list(own.values())) for letter, own in named.items())


def _pick(arrays, letter):
    if letter in arrays:
        return {letter: arrays[letter]}
    numbered = itertools.takewhile(arrays.__contains__, (f"{letter}{i}" for i in itertools.count()))
    picked = {name: arrays[name] for name in numbered}
    if not picked:
        raise ArraysError(
            f"which lacks `{letter}` and has {sorted(arrays)}", f"Name the arrays: {_EXAMPLE}"
        )
    return picked


def _check(arrays):
    # A member of the archive that is no array comes as bytes.
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "buif":
            raise ArraysError(f"where `{name}` has dtype {array.dtype}", "Convert it to numbers")
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        numbers = ", ".join(f"{count} in `{name}`" for name, count in counts.items())
        raise ArraysError(
            f"with {numbers} examples", "Pass as many examples in each array, and at least one"
        )
