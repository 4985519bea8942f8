"""A file is written whole or not at all."""

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
    # The target of a link is replaced, not the link.
    place = pathlib.Path(os.path.realpath(path))
    if place.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a folder. Choose another name.")
    try:
        _remove_abandoned(place.parent)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place.parent))
        with _locked(folder):
            try:
                _check_room(folder, size)
                yield folder / place.name
                _flush(folder / place.name)
                os.replace(folder / place.name, place)
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
            if is_mine and time.time() - partial.stat().st_mtime > _YOUNG:
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
