"""Copies what Keras would save, so that a thread can write the file while training goes on."""

import functools
import pathlib
import tempfile
import zipfile

import h5py
import keras
import numpy as np

from polyak_model import backend
from polyak_model.backend.common import optimizers_of
from polyak_model.backend.keras_internals import flatten_layers
from polyak_model.saving.variable_paths import NUMBER, save_numbers
from polyak_model.weight_files.keras_archive import WEIGHTS


class StagedFile:
    """A file of Keras without its tensors, and copies of these.

    Args:
        contents: The bytes of the file, in which each layer left its number alone.
        tensors: List of dicts, what each of them saves.
    """

    def __init__(self, contents, tensors):
        self._contents = contents
        self._tensors = tensors

    @property
    def size(self):
        """The largest size that the file can have, in bytes."""
        tensors = [tensor for each in self._tensors for tensor in each.values()]
        # HDF5 adds less to each.
        return len(self._contents) + sum(tensor.nbytes + 4096 for tensor in tensors)

    def write(self, path):
        """Writes the file that Keras would have written when it was staged.

        Args:
            path: A `pathlib.Path`, in a folder that may contain other files for a
                while; it ends in `.keras` or `.weights.h5`, as it was staged.
        """
        if path.suffix != ".keras":
            path.write_bytes(self._contents)
            self._fill(path)
            return
        empty, weights = path.with_name("empty.zip"), path.with_name(WEIGHTS)
        empty.write_bytes(self._contents)
        with zipfile.ZipFile(empty) as source, zipfile.ZipFile(path, "w") as target:
            for member in source.infolist():
                if member.filename == WEIGHTS:
                    source.extract(member, path.parent)
                    self._fill(weights)
                    target.write(weights, WEIGHTS)
                else:
                    target.writestr(member, source.read(member))
        empty.unlink()
        weights.unlink()

    def _fill(self, path):
        with h5py.File(path, "r+") as file:
            groups = []
            file.visit(lambda name: groups.append(name) if name.endswith(f"/{NUMBER}") else None)
            for name in groups:
                group = file[name].parent
                for key, tensor in self._tensors[int(file[name][()])].items():
                    # As Keras does.
                    dataset = group.create_dataset(key, data=tensor)
                    if tensor.dtype.name == "bfloat16":
                        dataset.attrs["dtype"] = "bfloat16"
                del file[name]


def save(model, path):
    """Lets Keras write a model, or its weights.

    Args:
        model: A built `keras.Model`.
        path: A `pathlib.Path` that ends in `.keras` or `.weights.h5`.
    """
    if path.suffix == ".keras":
        keras.saving.save_model(model, path)
    else:
        keras.Model.save_weights(model, path)


def stage(model, ending):
    """Copies what Keras would save of a model now.

    Args:
        model: A built `keras.Model`.
        ending: `".keras"`, or another string for a file of weights.

    Returns:
        A `StagedFile`, which refers to no variable.

    Example:

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> staged = stage(model, ".keras")
    >>> before = model.get_weights()[0]
    >>> model.set_weights([np.ones((1, 1)), np.ones(1)])
    >>> staged.write(folder / "model.keras")
    >>> bool(keras.models.load_model(folder / "model.keras").get_weights()[0] == before)
    True
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "empty.keras" if ending == ".keras" else "empty.weights.h5")
        layers = [*flatten_layers(model), *optimizers_of(model)]
        stored = save_numbers(layers, functools.partial(save, model, path))
        contents = path.read_bytes()
    tensors = [{k: np.array(backend.fetch(v)) for k, v in each.items()} for each in stored]
    return StagedFile(contents, tensors)
