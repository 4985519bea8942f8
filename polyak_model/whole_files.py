"""A file is written whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def written_whole(path):
    """Lets a file be written beside its place, and puts it there once it is whole.

    Whatever fails, the process being killed included, at `path` lies what lay
    there before or the whole new file. A process killed while it writes leaves a
    folder `.partial-...` beside it.

    Args:
        path: Where the file shall be; its folder exists.

    Yields:
        A `pathlib.Path` of the same name to write to.

    Raises:
        OSError: If the file cannot be written; its message names `path`.

    Example:

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with written_whole(folder / "average.txt") as partial:
    ...     _ = partial.write_text("0.5")
    >>> [path.name for path in folder.iterdir()]
    ['average.txt']
    """
    # The target of a link is replaced, not the link.
    place = pathlib.Path(os.path.realpath(path))
    if place.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a folder. Choose another name.")
    try:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
        try:
            yield folder / place.name
            _flush(folder / place.name)
            os.replace(folder / place.name, place)
            _flush(place.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        kept = "What was there before is unchanged. " if place.exists() else ""
        message = (
            f"Cannot write {str(path)!r}: {error.strerror or error}. {kept}"
            "Free space or choose another place."
        )
        raise OSError(error.errno, message) if error.errno else OSError(message) from error


def _flush(path):
    # The rename must not reach the disk before what it renames.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
