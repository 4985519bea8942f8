"""A file or folder is written whole or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
import time

try:
    import fcntl
except ImportError:  # Windows has no such locks, and opens no folders.
    fcntl = None

_PREFIX = ".partial-"
_FORMER = "former-"
_YOUNG = 60.0  # Seconds.


@contextlib.contextmanager
def written_whole(path, size=0):
    """Lets a file be written beside its place, and puts it there once it is whole.

    Whatever fails, the process being killed included, at `path` lies what lay
    there before or the whole new file. A process killed while it writes leaves a
    folder `.partial-...` beside it, which a later one to write there removes.

    Args:
        path: Where the file shall be; its folder exists.
        size: Int, bytes that it may take: if there is no room for them, nothing
            is begun. Defaults to 0. HDF5, which may crash the process when a
            disk fills up, should not be trusted to find out.

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
        _check_room(folder, size)
        yield folder / place.name
        _flush(folder / place.name)
        os.replace(folder / place.name, place)


@contextlib.contextmanager
def folder_written_whole(path, parts):
    """Lets a folder be written beside its place, and puts it there once it is whole.

    A folder that lies there is replaced by it. Whatever fails, it stays as it
    was; a process killed at the very moment of the exchange leaves it in the
    folder `.partial-...` beside its place, which nobody removes then.

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
        former = folder / f"{_FORMER}{place.name}"
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
        _remove_abandoned(place.parent)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place.parent))
        with _locked(folder):
            try:
                yield folder
                _flush(place.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        # HDF5 puts a page of its own state into the message.
        reason = os.strerror(error.errno) if error.errno else error
        kept = "What was there before is unchanged. " if place.exists() else ""
        message = f"Cannot write {str(path)!r}: {reason}. {kept}Free space or choose another place."
        raise OSError(error.errno, message) if error.errno else OSError(message) from error


def _check_room(folder, size):
    if not size or not hasattr(os, "posix_fallocate"):
        return
    with open(folder / "room", "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            # Some file systems cannot tell.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.remove(folder / "room")


def _remove_abandoned(folder):
    for partial in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(partial) as is_mine:
            # A younger one may be about to be locked.
            is_old = time.time() - partial.stat().st_mtime > _YOUNG
            if is_mine and is_old and not any(partial.glob(f"{_FORMER}*")):
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder):
    # The lock ends with the process that holds it, however that ends. Some file systems have none.
    with contextlib.ExitStack() as stack:
        is_mine = False
        if fcntl is not None:
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_mine = True
        yield is_mine


def _flush(path):
    # The rename must not reach the disk before what it renames.
    if path.is_dir() and fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
