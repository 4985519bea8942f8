"""Checks that a command makes before it computes or writes anything."""

import importlib
import os
import pathlib

from polyak_model.errors import InputError


def require(module, extra):
    """Checks that an optional dependency can be imported.

    Args:
        module: Its name.
        extra: The extra of this package that installs it.

    Raises:
        InputError: If it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"This command needs the package {module!r}, which cannot be imported ({error}). "
            f"Install it: pip install {module}; or, with all that the {extra} needs, in a clone of "
            f'the repository: pip install -e ".[{extra}]"'
        ) from error


def check_decay(value):
    """Returns the value of the option `--decay` of a command.

    Args:
        value: A float, or None if the option is absent.

    Raises:
        InputError: If it is not in [0, 1).

    Example:

    >>> check_decay(1.2)
    Traceback (most recent call last):
    ...
    polyak_model.errors.InputError: `--decay` must be in [0, 1). Received: 1.2. Try --decay 0.9.
    """
    if value is not None and not 0 <= value < 1:
        raise InputError(f"`--decay` must be in [0, 1). Received: {value}. Try --decay 0.9.")
    return value


def check_output_folder(folder):
    """Checks that a folder can be created or written to, without creating it.

    Args:
        folder: Its path.

    Raises:
        InputError: If the path is a file, lies inside one or is not writable.
    """
    ancestors = (folder, *pathlib.Path(folder).absolute().parents)
    nearest = next(path for path in ancestors if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise _folder_error(folder, f"{str(nearest)!r} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise _folder_error(folder, f"{str(nearest)!r} is not writable")


def make_output_folder(folder):
    """Creates a folder and its parents, unless they exist.

    Args:
        folder: Its path.

    Raises:
        InputError: If the system refuses.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _folder_error(folder, f"the system says: {error.strerror}") from error


def _folder_error(folder, problem):
    return InputError(
        f"`--output` must be a folder to write to. Received: {str(folder)!r}, but {problem}. "
        "Choose another, e.g. --output polyak-demo."
    )
