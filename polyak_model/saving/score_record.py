"""A few words kept in a model's file beside the weights: which score they had, and when."""

import json
import zipfile

import h5py

NAME = "polyak_model"
_MEMBER = f"{NAME}.json"


def write_record(path, record):
    """Adds a record to a `.keras` or `.weights.h5` file, where Keras overlooks it.

    Args:
        path: Path of the file, which has none yet.
        record: A dict that JSON can hold.

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
    """Returns the record in a file, or `{}` if there is none that can be read.

    Args:
        path: Path of a `.keras` or `.weights.h5` file.
    """
    try:
        if str(path).endswith(".keras"):
            with zipfile.ZipFile(path) as archive:
                record = json.loads(archive.read(_MEMBER))
        else:
            with h5py.File(path, "r") as file:
                record = json.loads(file.attrs[NAME])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return {}
    return record if isinstance(record, dict) else {}
