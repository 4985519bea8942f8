"""Which weight files can be averaged with which, and where the average may be written."""

import os
import pathlib

from polyak_model.errors import InputError
from polyak_model.weight_files.reader import find_kind


def is_optimizer_state(name):
    """Tells whether the group or variable of this name in a weight file is the optimizer's."""
    parts = name.split("/")
    # Below `layers` it would be a layer of that class.
    return any(
        a != "layers" and b == "optimizer" for a, b in zip(["", *parts], parts, strict=False)
    )


def check_kinds(paths, output):
    """Checks the endings of the files, and that the output can be created.

    Args:
        paths: The files to average.
        output: Where to write.

    Raises:
        InputError: If an ending is wrong, a `.keras` file cannot come out of
            these files, or the folder of `output` is missing.
    """
    kinds = {find_kind(path) for path in paths}
    kind = find_kind(output)
    if kind == ".weights.json":
        raise _output_error(output, "shards are read but not written", "a name in .weights.h5")
    if kind == ".keras" and kinds != {".keras"}:
        raise _output_error(
            output, "only .keras files know the model's configuration", "a name in .weights.h5"
        )
    try:
        if os.path.isdir(output):
            raise _output_error(output, "it is a folder", "another name")
        folder = pathlib.Path(os.path.realpath(output)).parent
        if not folder.is_dir():
            raise _output_error(output, "its folder does not exist", "an existing folder")
        os.lstat(output)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _output_error(output, f"the system says: {error.strerror}", "another name") from error


def check_places(files, output):
    """Checks that no file is named twice and the output is none of them, through links neither.

    Args:
        files: `WeightFile`s.
        output: Where to write.

    Raises:
        InputError: If one is.
    """
    seen = {}
    for file in files:
        for place in file.places:
            identity = _identify(place)
            if seen.setdefault(identity, file) is not file:
                names = {str(seen[identity].path), str(file.path)}
                raise InputError(
                    f"Two of the files are the same one: {' and '.join(map(repr, sorted(names)))}. "
                    "Name each once; use weights to count one more often."
                )
    if os.path.exists(output) and _identify(output) in seen:
        raise _output_error(output, "it is one of the files to average", "another name")


def check_alike(files):
    """Checks that all files hold the same variables.

    Args:
        files: `WeightFile`s.

    Raises:
        InputError: If a variable is missing somewhere, or has another shape or
            dtype.
    """
    first, *others = files
    expected = _weights(first)
    if not expected:
        raise InputError(f"Cannot average {str(first.path)!r}: it holds no weights. Name another.")
    for file in others:
        received = _weights(file)
        for name in sorted(expected.keys() ^ received.keys()):
            has, lacks = (first, file) if name in expected else (file, first)
            raise _difference(
                first, file, f"{name!r} is in {str(has.path)!r} but not in {str(lacks.path)!r}"
            )
        for name, variable in expected.items():
            formats = [f"{v.dtype} {v.shape}" for v in (variable, received[name])]
            if formats[0] != formats[1]:
                raise _difference(first, file, f"{name!r} is {formats[0]} and {formats[1]}")


def _weights(file):
    return {name: v for name, v in file.variables.items() if not is_optimizer_state(name)}


def _identify(place):
    status = os.stat(place)
    return status.st_dev, status.st_ino


def _difference(first, other, problem):
    return InputError(
        f"Cannot average {str(first.path)!r} with {str(other.path)!r}: {problem}. "
        "Name files of the same model."
    )


def _output_error(output, problem, remedy):
    return InputError(f"Cannot write {str(output)!r}: {problem}. Choose {remedy}.")
