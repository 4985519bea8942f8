"""Opens untrusted `.keras` files, zip archives, and checks them before anything is unpacked."""

import contextlib
import io
import json
import pathlib
import struct
import tempfile
import zipfile

from polyak_model.weight_files.hdf5 import GuardedFile
from polyak_model.weight_files.refusal import in_one_line, opened, refusal, refusing

WEIGHTS = "model.weights.h5"
CONFIG = "config.json"
METADATA = "metadata.json"
ASSETS = "assets"

_DAMAGED = "it is a damaged .keras file"
_LONGEST_JSON = {CONFIG: 16 * 2**20, METADATA: 2**20}
# Empty lists and dicts take the most memory per character.
_MOST_CONTAINERS = 10**6
_MOST_EXPANSION = 100
_SMALL = 64 * 2**20
_BLOCK = 2**20
_ENCRYPTED = 0x1


@contextlib.contextmanager
def open_archive(path):
    """Opens a `.keras` file, and checks the names and sizes of its members.

    Args:
        path: Its path.

    Yields:
        A `zipfile.ZipFile`.

    Raises:
        InputError: If it is not a zip archive, is damaged, or contains what no
            `.keras` file does.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opened(path))
        with refusing(path, _DAMAGED):
            archive = stack.enter_context(zipfile.ZipFile(file))
            _check_members(archive, path)
        yield archive


@contextlib.contextmanager
def open_member(archive, name, path):
    """Opens a member for random access, without a copy in memory.

    A stored member, as Keras writes it, is read in place; a compressed one is
    unpacked to a temporary file.

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
        with refusing(path, _DAMAGED):
            info = archive.getinfo(name)
            if info.compress_type == zipfile.ZIP_STORED:
                for _ in _read_blocks(archive, name, path):
                    pass  # The checksum is compared at the end.
                file = GuardedFile(archive.fp, _data_offset(archive.fp, info), info.file_size)
            else:
                unpacked = stack.enter_context(tempfile.TemporaryFile())
                unpacked.writelines(_read_blocks(archive, name, path))
                file = GuardedFile(unpacked, packed_size=info.compress_size)
        yield file


def read_json(archive, name, path):
    """Reads a member that contains a JSON object.

    Args:
        archive: A `zipfile.ZipFile` from `open_archive`.
        name: `CONFIG` or `METADATA`.
        path: The path of the archive, for errors.

    Returns:
        A dict.

    Raises:
        InputError: If the member is damaged, too long, nested too deep or not
            a JSON object.
    """
    with refusing(path, _DAMAGED):
        if archive.getinfo(name).file_size > _LONGEST_JSON[name]:
            raise refusal(path, f"its {name} is longer than {_LONGEST_JSON[name]:,} bytes")
        text = archive.read(name)
    return parse_json(text, f"its {name}", path)


def list_assets(archive, group=""):
    """Lists the members that layers of a model wrote, such as vocabularies.

    Args:
        archive: A `zipfile.ZipFile` from `open_archive`.
        group: The group of the model. Defaults to "", the whole file.

    Returns:
        A dict from the name of the member to its name in a file of that model
        alone.
    """
    inside = f"{ASSETS}/{group}/" if group else f"{ASSETS}/"
    return {
        name: f"{ASSETS}/{name.removeprefix(inside)}"
        for name in archive.namelist()
        if name.startswith(inside) and not name.endswith("/")
    }


def copy_member(archive, name, target, path, new_name=None):
    """Copies a member to another archive, block by block.

    Args:
        archive: A `zipfile.ZipFile` from `open_archive`.
        name: Name of the member.
        target: A `zipfile.ZipFile` open for writing.
        path: The path of the archive, for errors.
        new_name: Name in the other archive. Defaults to None: `name`.

    Raises:
        InputError: If the member is damaged.
    """
    with target.open(new_name or name, "w", force_zip64=True) as copy:
        copy.writelines(_read_blocks(archive, name, path))


def parse_json(text, what, path):
    """Parses a JSON object.

    Args:
        text: Bytes.
        what: What the text is, for errors, such as `its config.json`.
        path: The path of its file, for errors.

    Returns:
        A dict.

    Raises:
        InputError: If it is not a JSON object, nested too deep or has millions
            of lists and objects.
    """
    if text.count(b"[") + text.count(b"{") > _MOST_CONTAINERS:
        raise refusal(path, f"{what} has more than {_MOST_CONTAINERS:,} lists and objects")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"{what} is not JSON ({in_one_line(error)})") from error
    if not isinstance(parsed, dict):
        raise refusal(path, f"{what} is not a JSON object")
    return parsed


def _check_members(archive, path):
    members = archive.infolist()
    packed = archive.fp.seek(0, io.SEEK_END)
    names = [member.filename for member in members]
    for missing in {WEIGHTS, CONFIG, METADATA}.difference(names):
        raise refusal(path, f"it has no {missing}")
    if len(set(names)) < len(names):
        raise refusal(path, "two of its members have the same name")
    for member in members:
        if not _stays_inside(member.filename):
            raise refusal(path, f"its member {member.filename!r} is outside the archive's folder")
        if member.flag_bits & _ENCRYPTED:
            raise refusal(path, f"its member {member.filename!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refusal(path, f"its member {member.filename!r} has an unusual compression")
        if member.file_size > max(_SMALL, _MOST_EXPANSION * member.compress_size):
            raise refusal(
                path,
                f"its member {member.filename!r} declares {member.file_size:,} bytes in "
                f"{member.compress_size:,}",
            )
    # Several members may unpack the same bytes.
    if sum(member.file_size for member in members) > max(_SMALL, _MOST_EXPANSION * packed):
        raise refusal(path, f"it unpacks to more than {_MOST_EXPANSION} times its size")


def _stays_inside(name):
    climbs = ".." in pathlib.PurePosixPath(name).parts
    return name.isprintable() and not climbs and not name.startswith("/") and not {*"\\:"} & {*name}


def _read_blocks(archive, name, path):
    with refusing(path, f"its member {name!r} is damaged"), archive.open(name) as member:
        while block := member.read(_BLOCK):
            yield block


def _data_offset(file, info):
    file.seek(info.header_offset)
    # The lengths of the name and of the extra field follow 26 bytes of the local header.
    name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    return info.header_offset + 30 + name_length + extra_length
