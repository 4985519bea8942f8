"""What every command checks before it writes anything."""

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
        InputError: If it cannot.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"This command needs the package {module!r}, which cannot be imported ({error}). "
            f'Install what it needs: pip install "polyak_model[{extra}]"'
        ) from error


def check_folder(folder):
    """Checks that a folder can be created or written to, and creates nothing.

    Args:
        folder: A path.

    Raises:
        InputError: If it is a file, lies inside one or may not be written to.
    """
    ancestors = (folder, *pathlib.Path(folder).absolute().parents)
    nearest = next(path for path in ancestors if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise _folder_error(folder, f"{str(nearest)!r} exists and is no folder")
    if not os.access(nearest, os.W_OK):
        raise _folder_error(folder, f"{str(nearest)!r} may not be written to")


def make_folder(folder):
    """Creates a folder and those around it, unless they exist.

    Args:
        folder: A path.

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
