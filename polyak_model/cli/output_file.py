"""What every command checks of the file it writes, before anything else is done."""

import contextlib
import os

from polyak_model.errors import InputError


def check_output(output, endings, source=None):
    """Checks that a file can be written, and writes nothing.

    Args:
        output: Its path.
        endings: The endings its name may have, a tuple of strings.
        source: Path of a file that it must not replace, or None.

    Raises:
        InputError: If its name does not end so, or the place cannot be written
            to.
    """
    expected = " or ".join(endings)
    if not str(output).endswith(endings):
        problem = "whose name ends in something else"
    elif not output.parent.is_dir():
        problem = f"but there is no folder {str(output.parent)!r}"
    elif not os.access(output.parent, os.W_OK):
        problem = f"but {str(output.parent)!r} may not be written to"
    elif output.is_dir():
        problem = "which is a folder"
    elif source is not None and output.exists() and os.path.samefile(output, source):
        problem = "which is the file that is read"
    else:
        return
    raise InputError(
        f"`--output` must be a {expected} file to write. Received: {str(output)!r}, {problem}. "
        f"Choose another, e.g. --output result{endings[0]}."
    )


@contextlib.contextmanager
def told_in_one_line():
    """Turns the failure of writing a file, such as a full disk, into an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(str(error.strerror or error)) from error
