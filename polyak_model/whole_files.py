"""A file or folder is written whole or not at all."""

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
    place = _place(path)
    if place.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a folder. Choose another name.")
    with _beside(place, path) as folder:
        yield folder / place.name
        _flush(folder / place.name)
        os.replace(folder / place.name, place)


@contextlib.contextmanager
def folder_written_whole(path, parts):
    """Lets a folder be written beside its place, and puts it there once it is whole.

    A folder that lies there is replaced by it. Whatever fails, it stays as it
    was; a process killed at the very moment of the exchange leaves it in the
    folder `.partial-...` beside its place.

    Args:
        path: Where the folder shall be.
        parts: Names of what such a folder holds. One that holds anything else
            is not replaced.

    Yields:
        A `pathlib.Path` of the same name to write to; it does not exist yet.

    Raises:
        OSError: If the folder cannot be written or replaced; its message names
            `path`.

    Example:

    >>> place = pathlib.Path(tempfile.mkdtemp(), "served")
    >>> with folder_written_whole(place, ["graph.pb"]) as partial:
    ...     partial.mkdir()
    ...     _ = (partial / "graph.pb").write_text("+")
    >>> [path.name for path in place.iterdir()]
    ['graph.pb']
    """
    place = _place(path)
    _check_replaceable(place, path, parts)
    with _beside(place, path) as folder:
        yield folder / place.name
        for part in (folder / place.name).rglob("*"):
            _flush(part)
        former = folder / f"former-{place.name}"
        if place.exists():
            os.rename(place, former)
        try:
            os.rename(folder / place.name, place)
        except OSError:
            if former.exists():
                os.rename(former, place)
            raise


def _check_replaceable(place, path, parts):
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(
            f"Cannot write {str(path)!r}: it is a file, and a folder is to be written. Choose "
            "another name."
        )
    others = sorted(set(os.listdir(place)) - set(parts)) if place.exists() else []
    if others:
        raise FileExistsError(
            f"Cannot write {str(path)!r}: it would replace a folder that holds something else, "
            f"{others[0]!r} for instance. Expected there: nothing, or a folder of {sorted(parts)} "
            "alone. Choose a folder of its own."
        )


def _place(path):
    # The target of a link is replaced, not the link.
    return pathlib.Path(os.path.realpath(path))


@contextlib.contextmanager
def _beside(place, path):
    """Lends an empty folder beside a place."""
    try:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
        try:
            yield folder
            _flush(place.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        kept = "What was there before is unchanged. " if place.exists() else ""
        raise type(error)(
            error.errno,
            f"Cannot write {str(path)!r}: {error.strerror or error}. {kept}"
            "Free space or choose another place",
        ) from error


def _flush(path):
    # The rename must not reach the disk before what it renames.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
