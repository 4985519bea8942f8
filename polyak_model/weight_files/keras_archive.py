"""`.keras` files: zip archives that somebody else wrote, opened with distrust."""

import contextlib
import json
import pathlib
import struct
import tempfile
import zipfile
import zlib

from polyak_model.errors import InputError
from polyak_model.weight_files.guarded_file import GuardedFile
from polyak_model.weight_files.refusal import in_one_line, refusal, system_error

WEIGHTS = "model.weights.h5"
CONFIG = "config.json"
METADATA = "metadata.json"
_ASSETS = "assets/"

# What zipfile and zlib raise on damaged archives.
_DAMAGE = (
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_LONGEST_JSON = 32 * 2**20
_MOST_EXPANSION = 100
_SMALL = 64 * 2**20
_BLOCK = 2**20
_ENCRYPTED = 0x1


@contextlib.contextmanager
def open_archive(path):
    """Opens a `.keras` file, and checks the names and the sizes of its members.

    Args:
        path: Its path.

    Yields:
        A `zipfile.ZipFile`.

    Raises:
        InputError: If it is no zip archive, is damaged, or holds what no
            `.keras` file does.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise system_error(path, error) from error
        with _refusing(path):
            archive = stack.enter_context(zipfile.ZipFile(file))
            _check_members(archive, path)
        yield archive


@contextlib.contextmanager
def open_member(archive, name, path):
    """Opens a member for reading anywhere in it, without a copy in memory.

    A stored member, as Keras writes it, is read where it lies; a compressed one
    is unpacked to a temporary file.

    Args:
        archive: A `zipfile.ZipFile` from `open_archive`.
        name: Name of the member.
        path: The path of the archive, for errors.

    Yields:
        A `GuardedFile`.

    Raises:
        InputError: If the member is damaged.
    """
    with contextlib.ExitStack() as stack:
        with _refusing(path):
            info = archive.getinfo(name)
            if info.compress_type == zipfile.ZIP_STORED:
                _check_sum(archive, info)
                file = GuardedFile(archive.fp, _data_offset(archive.fp, info), info.file_size)
            else:
                unpacked = stack.enter_context(tempfile.TemporaryFile())
                _check_sum(archive, info, copy=unpacked)
                file = GuardedFile(unpacked)
        yield file


def read_json(archive, name, path):
    """Reads a member that holds a JSON object.

    Args:
        archive: A `zipfile.ZipFile` from `open_archive`.
        name: Name of the member.
        path: The path of the archive, for errors.

    Returns:
        A dict.

    Raises:
        InputError: If the member is damaged, too long, nested too deep or not
            a JSON object.
    """
    with _refusing(path):
        if archive.getinfo(name).file_size > _LONGEST_JSON:
            raise refusal(path, f"its {name} is longer than {_LONGEST_JSON:,} bytes")
        text = archive.read(name)
    return parse_json(text, f"its {name}", path)


def list_assets(archive):
    """Returns the names of the members of a `.keras` file that its layers wrote."""
    return [name for name in archive.namelist() if name.startswith(_ASSETS)]


def copy_member(archive, name, target, path):
    """Copies a member into another archive, block by block.

    Args:
        archive: A `zipfile.ZipFile` from `open_archive`.
        name: Name of the member.
        target: A `zipfile.ZipFile` open for writing.
        path: The path of the archive, for errors.

    Raises:
        InputError: If the member is damaged.
    """
    with target.open(name, "w", force_zip64=True) as copy, _refusing(path):
        _check_sum(archive, archive.getinfo(name), copy)


def parse_json(text, what, path):
    """Parses a JSON object.

    Args:
        text: Bytes.
        what: What it is, for errors, such as `its config.json`.
        path: The path of the file it is from, for errors.

    Returns:
        A dict.

    Raises:
        InputError: If it is no JSON object or nested too deep.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"{what} is no JSON ({in_one_line(error)})") from error
    if not isinstance(parsed, dict):
        raise refusal(path, f"{what} holds no JSON object")
    return parsed


def _check_members(archive, path):
    members = archive.infolist()
    names = [member.filename for member in members]
    for missing in {WEIGHTS, CONFIG, METADATA}.difference(names):
        raise refusal(path, f"it holds no {missing}")
    if len(set(names)) < len(names):
        raise refusal(path, "two of its members have the same name")
    for member in members:
        if not _stays_inside(member.filename):
            raise refusal(path, f"its member {member.filename!r} would be written outside a folder")
        if member.flag_bits & _ENCRYPTED:
            raise refusal(path, f"its member {member.filename!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refusal(path, f"its member {member.filename!r} is compressed in an unusual way")
        if member.file_size > max(_SMALL, _MOST_EXPANSION * member.compress_size):
            raise refusal(
                path,
                f"its member {member.filename!r} declares {member.file_size:,} bytes in "
                f"{member.compress_size:,}",
            )


def _stays_inside(name):
    climbs = ".." in pathlib.PurePosixPath(name).parts
    return name.isprintable() and not climbs and not name.startswith("/") and not {*"\\:"} & {*name}


def _check_sum(archive, info, copy=None):
    # zipfile compares the checksum when the last byte is read.
    with archive.open(info) as member:
        while block := member.read(_BLOCK):
            if copy is not None:
                copy.write(block)


def _data_offset(file, info):
    file.seek(info.header_offset)
    # After 26 bytes of the local header come the lengths of the name and of the extra field.
    name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    return info.header_offset + 30 + name_length + extra_length


@contextlib.contextmanager
def _refusing(path):
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise refusal(path, f"it is a damaged .keras file ({in_one_line(error)})") from error
