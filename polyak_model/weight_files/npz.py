"""Reads arrays from an untrusted .npz file: only those that are used, without running code."""

import io
import itertools
import math
import os
import zipfile

import numpy as np

from polyak_model.errors import InputError
from polyak_model.weight_files.refusal import converting, open_regular, reason

_EXAMPLE = "numpy.savez(file, x=inputs, y=targets)"
_SUFFIX = ".npy"
_SMALL = 64 * 2**20
_MOST_EXPANSION = 100


class ArraysError(InputError):
    """Why arrays cannot be used.

    Args:
        problem: What is wrong with the file; it follows the name of the file.
        remedy: How to fix it.
    """

    def __init__(self, problem, remedy):
        super().__init__(f"{problem}. {remedy}.")
        self.problem = problem
        self.remedy = remedy


def load_held_out(path):
    """Loads inputs and targets to score a model on.

    Args:
        path: An .npz file with the arrays `x` and `y`, whose first axes are the
            examples; for a model with several inputs or outputs `x0`, `x1` and
            so on, in the order of the model.

    Returns:
        Tuple `(x, y)` of arrays; numbered arrays are in a list.

    Raises:
        InputError: If the file cannot be used.
    """
    try:
        arrays = read_arrays(path, _EXAMPLE, _choose)
        _check(arrays)
    except ArraysError as error:
        raise InputError(
            "`--data` must be an .npz file of held-out data with arrays `x` and `y`, or `x0`, `x1` "
            "and so on for several inputs. "
            f"Received: {os.fspath(path)!r}, {error.problem}. {error.remedy}."
        ) from error
    return tuple(
        arrays[letter] if letter in arrays else [a for n, a in arrays.items() if n[0] == letter]
        for letter in "xy"
    )


def load_inputs(path):
    """Loads inputs to refresh the statistics of a model with.

    Args:
        path: An .npz file with the array `x`; for a model with several inputs
            `x0`, `x1` and so on. Other arrays are not read.

    Returns:
        An array, or a list of numbered arrays.

    Raises:
        InputError: If the file cannot be used.
    """
    try:
        arrays = read_arrays(path, _EXAMPLE, lambda names: _pick(names, "x"))
        _check(arrays)
    except ArraysError as error:
        raise InputError(
            "`--refresh` must be an .npz file of training data with an array `x`, or `x0`, `x1` "
            f"and so on. Received: {os.fspath(path)!r}, {error.problem}. {error.remedy}."
        ) from error
    return arrays["x"] if "x" in arrays else list(arrays.values())


def read_arrays(path, example, choose=None):
    """Reads arrays of an .npz file.

    Args:
        path: Its path.
        example: How to write such a file, e.g. `numpy.savez(file, x=x, y=y)`.
        choose: A function from the list of names in the file to the names to
            read; the other arrays are not read. Defaults to None: all.

    Returns:
        A dict from name to array.

    Raises:
        ArraysError: If the file is missing or damaged, contains objects, or
            unpacks to much more than its size.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise ArraysError("which does not exist", "Check the path") from error
    except OSError as error:
        raise ArraysError(f"which cannot be read: {reason(error)}", "Check the path") from error
    with file, converting(lambda error: _unreadable(error, example)):
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise ArraysError("which is a single array without a name", f"Name it: {example}")
        with zipfile.ZipFile(file) as archive:
            members = {each.filename.removesuffix(_SUFFIX): each for each in archive.infolist()}
            names = choose(list(members)) if choose else list(members)
            total = sum(members[name].file_size for name in names)
            if total > max(_SMALL, _MOST_EXPANSION * file.seek(0, io.SEEK_END)):
                raise ArraysError(
                    f"whose arrays unpack to {total:,} bytes, more than {_MOST_EXPANSION} times "
                    "its size",
                    "Write it without compression, with numpy.savez",
                )
            return {name: _read(archive, members[name]) for name in names}


def _unreadable(error, example):
    return ArraysError(
        f"which cannot be read as arrays of numbers ({type(error).__name__})",
        f"Write it with {example}, without object arrays",
    )


def _read(archive, member):
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(file)
        # NumPy allocates what the header declares before it reads.
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError("the header declares another size")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _choose(names):
    return [name for letter in "xy" for name in _pick(names, letter)]


def _pick(names, letter):
    if letter in names:
        return [letter]
    numbered = (f"{letter}{i}" for i in itertools.count())
    picked = list(itertools.takewhile(names.__contains__, numbered))
    if not picked:
        raise ArraysError(
            f"which lacks `{letter}` and has {sorted(names)}", f"Name the arrays: {_EXAMPLE}"
        )
    return picked


def _check(arrays):
    for name, array in arrays.items():
        if array.dtype.kind not in "buif":
            raise ArraysError(f"where `{name}` has dtype {array.dtype}", "Convert it to numbers")
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        numbers = ", ".join(f"{count} in `{name}`" for name, count in counts.items())
        raise ArraysError(
            f"with {numbers} examples", "Pass the same number in each array, and at least one"
        )
