"""Atomic writes: a file or folder is replaced as a whole or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
import stat
import tempfile
import time

from polyak_model.weight_files.refusal import find_errno, reason

try:
    import fcntl
except ImportError:  # Windows has no such locks, and cannot open folders.
    fcntl = None  # type: ignore[assignment]

PREFIX = ".polyak_model-partial-"
# Shows that this package made the folder.
_MARK = "made-by-polyak_model"
_FORMER = "former-"
_YOUNG = 60.0  # Seconds.


@contextlib.contextmanager
def atomic_file(path, size=0, is_durable=True):
    """Writes a file atomically.

    Whatever fails, even if the process is killed, the old file or the complete
    new one is at `path`. A replaced file hands on its mode and, where the system
    permits it, its owner. A process that is killed leaves a temporary folder,
    which a later write to the same folder removes.

    Args:
        path: Where to write; its folder exists.
        size: Int, the bytes that the file may take: if there is no room for
            them, nothing is written. Defaults to 0. HDF5 may crash the process
            on a full disk, so pass it for HDF5 files.
        is_durable: Bool. Whether to wait until the disk has the file, for one that
            must outlive the power. Defaults to True.

    Yields:
        A `pathlib.Path` of the same name to write to.

    Raises:
        OSError: If the file cannot be written; its message names `path`.

    Example:

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with atomic_file(folder / "average.txt") as partial:
    ...     _ = partial.write_text("0.5")
    >>> [path.name for path in folder.iterdir()]
    ['average.txt']
    """
    place = _resolve(path)
    if place.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a folder. Choose another name.")
    with _temporary_folder(place, path) as folder:
        _check_room(folder, size)
        yield folder / place.name
        if is_durable:
            _flush(folder / place.name)
        _keep_permissions(place, folder / place.name)
        os.replace(folder / place.name, place)


@contextlib.contextmanager
def atomic_folder(path, parts):
    """Writes a folder atomically, replacing an old one.

    Whatever fails, the old folder stays. If the process is killed between the
    two renames of the exchange, the old folder is in the temporary folder beside
    `path`, which is then never removed.

    Args:
        path: Where to write.
        parts: Names of what such a folder may contain. A folder with anything
            else is not replaced.

    Yields:
        A `pathlib.Path` of the same name to write to; it does not exist yet.

    Raises:
        OSError: If the folder cannot be written or replaced; its message names
            `path`.

    Example:

    >>> place = pathlib.Path(tempfile.mkdtemp(), "served")
    >>> with atomic_folder(place, ["graph.pb"]) as partial:
    ...     partial.mkdir()
    ...     _ = (partial / "graph.pb").write_text("+")
    >>> [path.name for path in place.iterdir()]
    ['graph.pb']
    """
    place = _resolve(path)
    _check_replaceable(place, path, parts)
    with _temporary_folder(place, path) as folder:
        yield folder / place.name
        for part in (folder / place.name).rglob("*"):
            _flush(part)
        _keep_permissions(place, folder / place.name)
        former = folder / f"{_FORMER}{place.name}"
        if place.exists():
            os.rename(place, former)
        try:
            os.rename(folder / place.name, place)
        except OSError:
            if former.exists():
                os.rename(former, place)
            raise


def make_folder(path):
    """Makes a folder, and those above it, unless it exists.

    Args:
        path: A `pathlib.Path`.

    Raises:
        OSError: If it cannot be made; its message names `path`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = "a file has its name" if path.is_file() else reason(error)
        message = f"Cannot create the folder {str(path)!r}: {problem}. Choose another place."
        raise OSError(error.errno, message) from error


def _check_replaceable(place, path, parts):
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(
            f"Cannot write {str(path)!r}: it is a file where a folder is to be written. Choose "
            "another name."
        )
    others = sorted(set(os.listdir(place)) - set(parts)) if place.exists() else []
    if others:
        raise FileExistsError(
            f"Cannot write {str(path)!r}: it would replace a folder that contains something else, "
            f"for instance {others[0]!r}. Expected there: nothing, or a folder of {sorted(parts)} "
            "alone. Choose a folder of its own."
        )


def _resolve(path):
    # The target of a link is replaced, not the link.
    return pathlib.Path(os.path.realpath(path))


@contextlib.contextmanager
def _temporary_folder(place, path):
    """Makes a temporary folder beside `place`, on the same file system."""
    try:
        _remove_abandoned(place.parent)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=PREFIX, dir=place.parent))
        with _locked(folder):
            try:
                (folder / _MARK).touch()
                yield folder
                _flush(place.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        number = find_errno(error)
        # HDF5 puts a page of its own state into the message.
        problem = reason(error)
        kept = "What was there before is unchanged. " if place.exists() else ""
        message = (
            f"Cannot write {str(path)!r}: {problem}. {kept}Free space or choose another place."
        )
        raise OSError(number, message) if number else OSError(message) from error


def _check_room(folder, size):
    if not size or not hasattr(os, "posix_fallocate"):
        return
    with open(folder / "room", "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            # Some file systems cannot reserve space.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.remove(folder / "room")


def _keep_permissions(old, new):
    if not old.exists() or not new.exists():
        return
    status = old.stat()
    if hasattr(os, "chown"):
        # Only a superuser may change the owner; a member may set the group.
        for owner in (status.st_uid, -1):
            with contextlib.suppress(OSError):
                os.chown(new, owner, status.st_gid)
                break
    os.chmod(new, stat.S_IMODE(status.st_mode))


def _remove_abandoned(folder):
    for partial in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(partial) as is_locked:
            # A younger one may be about to be locked.
            is_old = time.time() - partial.stat().st_mtime > _YOUNG
            is_ours = (partial / _MARK).is_file() and not partial.is_symlink()
            if is_locked and is_old and is_ours and not any(partial.glob(f"{_FORMER}*")):
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder):
    # The lock ends with its process, however that ends. Some file systems have no locks.
    with contextlib.ExitStack() as stack:
        is_locked = False
        if fcntl is not None:
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
        yield is_locked


def _flush(path):
    # The rename must not reach the disk before what it renames.
    if path.is_dir() and fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
