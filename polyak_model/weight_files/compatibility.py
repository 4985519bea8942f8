"""Checks that weight files can be averaged with each other."""

import numpy as np

from polyak_model.errors import InputError
from polyak_model.weight_files import safetensors_file
from polyak_model.weight_files.output import check_output, identify
from polyak_model.weight_files.reader import find_kind
from polyak_model.weight_files.tensor import cut
from polyak_model.weight_files.training_state import split_variables

_BLOCK = 2**20


def check_kinds(paths, output):
    """Checks the endings of the files, and that the output can be created.

    Args:
        paths: The files to average.
        output: The file to write.

    Raises:
        InputError: If an ending is wrong, a `.keras` file cannot be made from
            these files, or the output cannot be created.
    """
    kinds = {find_kind(path) for path in paths}
    check_output(output, (".weights.h5", ".keras", safetensors_file.ENDING))
    if safetensors_file.ENDING in kinds and find_kind(output) != safetensors_file.ENDING:
        raise InputError(
            f"Cannot write {str(output)!r}: .safetensors files contain tensors alone, without the "
            "layers that Keras looks for. Choose a name in .safetensors."
        )
    if find_kind(output) == ".keras" and kinds != {".keras"}:
        raise InputError(
            f"Cannot write {str(output)!r}: only .keras files contain the config of the model. "
            "Choose a name in .weights.h5."
        )


def check_places(files, output):
    """Checks that no file is named twice and the output is none of them, even through links.

    Args:
        files: `WeightFile`s.
        output: The file to write.

    Raises:
        InputError: If one is.
    """
    seen = {}
    for file in files:
        for place in file.places:
            identity = identify(place)
            if seen.setdefault(identity, file) is not file:
                names = {str(seen[identity].path), str(file.path)}
                raise InputError(
                    f"Two of the files are the same one: {' and '.join(map(repr, sorted(names)))}. "
                    "Name each once; use weights to count one more often."
                )
    check_output(output, (find_kind(output),), [place for file in files for place in file.places])


def check_alike(files):
    """Checks that all files contain the same variables, and that these can be averaged.

    Args:
        files: `WeightFile`s.

    Raises:
        InputError: If a variable is missing somewhere, has another shape or
            dtype, or is quantized.
    """
    first, *others = files
    expected, _ = split_variables(first)
    if not expected:
        raise InputError(f"Cannot average {str(first.path)!r}: it has no weights. Name another.")
    for file in others:
        received, _ = split_variables(file)
        for name in sorted(expected.keys() ^ received.keys()):
            has, lacks = (first, file) if name in expected else (file, first)
            raise _difference(
                first, file, f"{name!r} is in {str(has.path)!r} but not in {str(lacks.path)!r}"
            )
        for name, variable in expected.items():
            formats = [f"{v.dtype} {v.shape}" for v in (variable, received[name])]
            if formats[0] != formats[1]:
                raise _difference(first, file, f"{name!r} is {formats[0]} and {formats[1]}")
        for name in _find_quantized(expected):
            if _differ(expected[name], received[name]):
                raise InputError(
                    f"Cannot average {str(first.path)!r} with {str(file.path)!r}: {name!r} is "
                    f"quantized to {expected[name].dtype}, and integers of different scales have "
                    "no average. Average files from before `quantize`, then quantize the average."
                )


def _find_quantized(variables):
    """Yields the names of 8-bit integers with floats, their scales, in the same group."""
    scaled = {name.rpartition("/")[0] for name, v in variables.items() if "float" in v.dtype}
    for name, variable in variables.items():
        if variable.dtype in ("int8", "uint8") and name.rpartition("/")[0] in scaled:
            yield name


def _differ(one, other):
    return any(
        not np.array_equal(one.read(part), other.read(part)) for part in cut(one.shape, _BLOCK)
    )


def _difference(first, other, problem):
    return InputError(
        f"Cannot average {str(first.path)!r} with {str(other.path)!r}: {problem}. "
        "Name files of the same model."
    )
