"""Checks of a file to write, and errors while it is written."""

import contextlib
import os
import pathlib

from polyak_model.errors import InputError
from polyak_model.weight_files.atomic_write import atomic_file


def check_output(output, endings, sources=()):
    """Checks that a file can be written, and writes nothing.

    Args:
        output: Its path.
        endings: The endings that its name may have, a tuple of strings.
        sources: Paths of files that it must not replace, not even through links.

    Raises:
        InputError: If the output is a folder, has another ending, is one of
            `sources`, or cannot be created.
    """
    if os.path.isdir(output):
        raise _output_error(output, "it is a folder", "another name")
    if not str(output).endswith(tuple(endings)):
        expected = " or ".join(endings)
        raise _output_error(output, f"its name must end in {expected}", "another name")
    try:
        folder = pathlib.Path(os.path.realpath(output)).parent
        if not folder.is_dir():
            raise _output_error(output, "its folder does not exist", "an existing folder")
        if not os.access(folder, os.W_OK):
            raise _output_error(output, "its folder is not writable", "another folder")
        if os.path.lexists(output) and identify(output) in map(identify, sources):
            raise _output_error(output, "it is one of the files to read", "another name")
        os.lstat(output)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _output_error(output, error.strerror, "another name") from error


def identify(path):
    """Returns what all names of a file have in common."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def writing(output, size=0, is_durable=True):
    """Writes a file atomically, see `atomic_file`, and reports failures in one line.

    Args:
        output: Path of the file.
        size: Int, the bytes that it may take. Defaults to 0.
        is_durable: Bool. Whether to wait until the disk has it. Defaults to True.

    Yields:
        The path to write to.

    Raises:
        InputError: If the file cannot be written; what was at `output` is
            unchanged.
    """
    try:
        with atomic_file(output, size, is_durable) as partial:
            yield partial
    except OSError as error:
        raise InputError(str(error.strerror or error)) from error


def _output_error(output, problem, remedy):
    return InputError(f"Cannot write {str(output)!r}: {problem}. Choose {remedy}.")
