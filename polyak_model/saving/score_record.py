"""Records the score of the weights, and when they had it, in their file."""

import json
import zipfile

import h5py

from polyak_model.errors import InputError
from polyak_model.weight_files.hdf5 import GuardedFile, read_attribute
from polyak_model.weight_files.refusal import opened, refusing

NAME = "polyak_model"
_MEMBER = f"{NAME}.json"
_LONGEST = 2**20


def write_record(path, record):
    """Adds a record to a `.keras` or `.weights.h5` file, where Keras ignores it.

    Args:
        path: Path of a file without a record.
        record: A dict that can be encoded as JSON.

    Example:

    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/model.weights.h5"
    >>> h5py.File(path, "w").close()
    >>> write_record(path, {"score": 0.25})
    >>> read_record(path)
    {'score': 0.25}
    """
    text = json.dumps(record)
    if str(path).endswith(".keras"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_MEMBER, text)
    else:
        with h5py.File(path, "a") as file:
            file.attrs[NAME] = text


def read_record(path):
    """Returns the record in a file, or `{}` if there is none.

    The file is untrusted: whatever is wrong with it, nothing is raised.

    Args:
        path: Path of a `.keras` or `.weights.h5` file.
    """
    try:
        with opened(path) as file, refusing(path, "it has no record"):
            read = _read_member if str(path).endswith(".keras") else _read_attribute
            record = json.loads(read(file))
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


def _read_member(file):
    with zipfile.ZipFile(file) as archive:
        if archive.getinfo(_MEMBER).compress_type != zipfile.ZIP_STORED:
            raise ValueError("write_record compresses nothing")
        with archive.open(_MEMBER) as member:
            return member.read(_LONGEST)


def _read_attribute(file):
    with h5py.File(GuardedFile(file), "r") as hdf5:
        return read_attribute(hdf5, NAME)
