"""Writes weight files that Keras or safetensors loads, without Keras."""

import contextlib
import json
import shutil
import zipfile

import h5py
import numpy as np

from polyak_model.weight_files import safetensors_file
from polyak_model.weight_files.keras_archive import (
    CONFIG,
    METADATA,
    WEIGHTS,
    copy_member,
    list_assets,
)
from polyak_model.weight_files.refusal import find_errno, in_one_line, refusal

_BLOCK = 2**20


@contextlib.contextmanager
def created_weights(path, like, config=None, group="", libver=None):
    """Creates a weight file with everything of another one but the tensors and groups.

    Args:
        path: Where, in a folder that may contain other files for a while; it
            ends in `.weights.h5`, `.keras` or `.safetensors`.
        like: The other `WeightFile`, a `.keras` file if `path` is one.
        config: The contents of config.json. Defaults to None: those of `like`,
            without what the model was compiled with, since Keras would warn of
            an optimizer without state.
        group: The group of the model in `like` that is written, for its assets.
            Defaults to "", the whole file.
        libver: The format of a `.weights.h5` file, as h5py names it. Defaults to
            None: the oldest.

    Yields:
        An `h5py.File` or a `TensorsWriter` to fill with `create_groups` and
        `create_variable`.

    Raises:
        InputError: If `like` is damaged.
        OSError: If the file cannot be written.
    """
    if path.name.endswith(safetensors_file.ENDING):
        metadata = like.metadata if like.kind == safetensors_file.ENDING else {}
        with safetensors_file.created_tensors(path, metadata) as tensors:
            yield tensors
        return
    if not str(path).endswith(".keras"):
        with _created_hdf5(path, libver) as file:
            yield file
        return
    # h5py writes at random positions, a member of an archive is written in sequence.
    weights = path.with_name(WEIGHTS)
    with _created_hdf5(weights) as file:
        yield file
    with zipfile.ZipFile(path, "w") as archive:
        copy_member(like.archive, METADATA, archive, like.path)
        archive.writestr(CONFIG, _dump(config or {**like.config, "compile_config": None}, like))
        with (
            open(weights, "rb") as source,
            archive.open(WEIGHTS, "w", force_zip64=True) as target,
        ):
            shutil.copyfileobj(source, target, _BLOCK)
        for name, new_name in list_assets(like.archive, group).items():
            copy_member(like.archive, name, archive, like.path, new_name)
    weights.unlink()


def create_groups(file, attributes):
    """Creates groups with their attributes, where the format has groups.

    Args:
        file: An `h5py.File` or a `TensorsWriter`.
        attributes: A dict from the name of each group to its attributes; the
            outermost group is "".
    """
    if isinstance(file, safetensors_file.TensorsWriter):
        return
    for name, values in attributes.items():
        group = file.require_group(name) if name else file
        for key, value in values.items():
            group.attrs[key] = value


def create_variable(file, name, shape, dtype):
    """Creates a tensor in the format of Keras, to be filled part by part and in order.

    Args:
        file: An `h5py.File` or a `TensorsWriter`.
        name: Its path in the file.
        shape: A tuple of ints.
        dtype: Its dtype as Keras names it.

    Returns:
        A function of (index, array) that writes an array of that dtype to a part
        of the tensor, where `index` is a tuple of slices and ints.
    """
    if isinstance(file, safetensors_file.TensorsWriter):
        return file.create(name, shape, dtype)
    opaque = np.dtype("V2") if dtype == "bfloat16" else None
    dataset = file.create_dataset(name, shape, opaque or dtype)
    if opaque:
        dataset.attrs["dtype"] = "bfloat16"

    def write(index, array):
        dataset[index] = array.view(opaque) if opaque else array

    return write


def create_array(file, name, array):
    """Creates a dataset with its values, as `file.create_dataset(name, data=array)` does.

    It takes a third of the time, most of which h5py spends on arguments that are not used here.

    Args:
        file: An `h5py.File`.
        name: Its path in the file.
        array: A NumPy array.
    """
    with_groups = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    with_groups.set_create_intermediate_group(True)
    array = np.asarray(array, order="C")
    dtype = h5py.h5t.py_create(array.dtype, logical=True)
    space = h5py.h5s.create_simple(array.shape) if array.ndim else h5py.h5s.create(h5py.h5s.SCALAR)
    dataset = h5py.h5d.create(file.id, name.encode(), dtype, space, lcpl=with_groups)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, array)


@contextlib.contextmanager
def _created_hdf5(path, libver=None):
    try:
        with h5py.File(path, "w", libver=libver) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # h5py reports a full disk in several lines, and as a RuntimeError when it closes a file.
        raise OSError(find_errno(error), in_one_line(error)) from error


def _dump(config, like):
    try:
        return json.dumps(config)
    except RecursionError as error:
        # What can just be read may be nested too deep to be written.
        raise refusal(like.path, f"its {CONFIG} is nested too deep") from error
