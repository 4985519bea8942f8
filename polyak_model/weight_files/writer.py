"""Weight files that Keras loads, written without Keras."""

import contextlib
import json
import shutil
import zipfile

import h5py
import numpy as np

from polyak_model.weight_files.keras_archive import (
    CONFIG,
    METADATA,
    WEIGHTS,
    copy_member,
    list_assets,
)
from polyak_model.weight_files.refusal import in_one_line

_BLOCK = 2**20


@contextlib.contextmanager
def created_weights(path, like):
    """Creates a weight file with the groups, and the rest but the tensors, of another.

    A `.keras` file will not be compiled when Keras loads it: an optimizer
    without its state would be warned about.

    Args:
        path: Where, in a folder that may hold other files for a while; it ends
            in `.weights.h5` or `.keras`.
        like: The `WeightFile` of the other, a `.keras` file if `path` is one.

    Yields:
        An `h5py.File` to create the tensors in, with `create_variable`.
    """
    if not str(path).endswith(".keras"):
        with _created_hdf5(path) as file:
            yield file
        return
    # h5py has to go back and forth in what it writes; a member of an archive is written in one go.
    weights = path.with_name(WEIGHTS)
    with _created_hdf5(weights) as file:
        yield file
    with zipfile.ZipFile(path, "w") as archive:
        copy_member(like.archive, METADATA, archive, like.path)
        archive.writestr(CONFIG, json.dumps({**like.config, "compile_config": None}))
        with (
            open(weights, "rb") as source,
            archive.open(WEIGHTS, "w", force_zip64=True) as target,
        ):
            shutil.copyfileobj(source, target, _BLOCK)
        for name in list_assets(like.archive):
            copy_member(like.archive, name, archive, like.path)
    weights.unlink()


@contextlib.contextmanager
def _created_hdf5(path):
    try:
        with h5py.File(path, "w") as file:
            yield file
    except (OSError, RuntimeError) as error:
        # h5py tells of a full disk in several lines, and as a RuntimeError when it closes a file.
        raise OSError(getattr(error, "errno", None), in_one_line(error)) from error


def create_groups(file, attributes):
    """Creates groups with their attributes.

    Args:
        file: An `h5py.File`.
        attributes: A dict from the name of each group to its attributes; the
            outermost is "".
    """
    for name, values in attributes.items():
        group = file.require_group(name) if name else file
        for key, value in values.items():
            group.attrs[key] = value


def create_variable(file, variable):
    """Creates a tensor without its numbers, in the format of Keras.

    Args:
        file: An `h5py.File`.
        variable: The `Variable` whose name, shape and dtype it takes.

    Returns:
        A function of (part, array): writes an array of that dtype to a part of
        the tensor, a tuple of slices or ints.
    """
    opaque = np.dtype("V2") if variable.dtype == "bfloat16" else None
    dataset = file.create_dataset(variable.name, variable.shape, opaque or variable.dtype)
    if opaque:
        dataset.attrs["dtype"] = "bfloat16"

    def write(part, array):
        dataset[part] = array.view(opaque) if opaque else array

    return write
