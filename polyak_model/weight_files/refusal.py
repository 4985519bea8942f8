"""Turns whatever goes wrong with a file into an `InputError` of one line."""

import contextlib
import errno
import os
import re
import stat

from polyak_model.errors import InputError, printable

# Errors of the machine, not of the file, with the way out.
_MACHINE = {
    errno.EMFILE: "Raise the limit with ulimit -n, or average the averages of fewer files",
    errno.ENFILE: "Close other programs",
    errno.ENOSPC: "Free disk space, or set TMPDIR to a folder on another disk",
    errno.EDQUOT: "Free disk space, or set TMPDIR to a folder on another disk",
    errno.ENOMEM: "Free memory",
    errno.EIO: "Check the disk",
}
_LONGEST_MESSAGE = 200


def refusal(source, problem, remedy="Save the weights again with Keras"):
    """Returns the `InputError` for a file that cannot be used."""
    return InputError(f"Cannot use {str(source)!r}: {problem}. {remedy}.")


def system_error(source, error):
    """Returns the `InputError` for a file that cannot be opened or read."""
    number = find_errno(error)
    return refusal(source, reason(error), _MACHINE.get(number, "Check the path"))


def reason(error):
    """Returns why the operating system failed, e.g. `No such file or directory`."""
    number = find_errno(error)
    return os.strerror(number) if number else in_one_line(error)


def refusing(source, problem):
    """Turns every exception of library calls on a file into a refusal, as a context manager.

    Args:
        source: Path of the file.
        problem: What an exception means, e.g. `it is damaged`.

    Raises:
        InputError: In place of any other exception.
    """

    def convert(error):
        if find_errno(error) in _MACHINE:
            return system_error(source, error)
        return refusal(source, f"{problem} ({in_one_line(error)})")

    return converting(convert)


@contextlib.contextmanager
def converting(convert):
    """Turns every exception of library calls on a file into an `InputError`.

    No list of exceptions would be complete: on damaged files, h5py, HDF5, NumPy,
    zipfile and csv raise dozens of types, such as `tokenize.TokenError`.

    Args:
        convert: Function from an exception to an `InputError`.

    Raises:
        InputError: In place of any other exception.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise convert(error) from error


def find_errno(error):
    """Returns the error number of the operating system in an exception, or None.

    HDF5 reports it in the text of a message alone.

    Example:

    >>> find_errno(OSError(28, "full")), find_errno(RuntimeError("write failed: errno = 28, ..."))
    (28, 28)
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"errno = (\d+)", str(error))):
        number = int(found[1])
    return number


def in_one_line(error):
    """Returns the message of an exception as one printable line of bounded length.

    Example:

    >>> in_one_line(OSError("no data.\\n  at all"))
    'no data. at all'
    """
    text = printable(" ".join(str(error).split()).rstrip(".")) or type(error).__name__
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "…"


def open_regular(path):
    """Opens a regular file for reading.

    A pipe or a device is not opened, since reading it may block or never end.

    Args:
        path: Its path.

    Returns:
        A binary file.

    Raises:
        OSError: If it cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise OSError(in_one_line(error)) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError("it is not a regular file")
    return open(path, "rb")


@contextlib.contextmanager
def opened(path):
    """Opens a regular file for reading, as a context manager.

    Raises:
        InputError: If it cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise system_error(path, error) from error
    with file:
        yield file
