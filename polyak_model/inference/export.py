"""Exports a model atomically, to be served where this package is not installed."""

import contextlib
import io
import pathlib
import re

import keras
from keras import tree

from polyak_model.average.clone_check import input_specs
from polyak_model.backend import keras_internals
from polyak_model.weight_files.atomic_write import atomic_file, atomic_folder, make_folder

_SAVED_MODEL = ("assets", "fingerprint.pb", "saved_model.pb", "variables")
_WRITING = {
    "tf_saved_model": lambda path: atomic_folder(path, _SAVED_MODEL),
    "onnx": atomic_file,
    "litert": atomic_file,
}
_REMOTE = re.compile(r"[a-z0-9]+://")


def export(model, filepath, format, **kwargs):
    """Exports a model as Keras does; if that fails, an older artifact at `filepath` stays.

    Args:
        model: A built `keras.Model`.
        filepath: Path of the artifact.
        format: As in `keras.Model.export`. Formats of several files, and remote
            file systems (`gs://...`), are left to Keras.
        **kwargs: Further arguments of `keras.Model.export`.

    Raises:
        OSError: If the artifact cannot be written; its message names `filepath`.
    """
    if format not in _WRITING or _REMOTE.match(str(filepath)):
        model.export(filepath, format=format, **kwargs)
        return
    make_folder(pathlib.Path(filepath).absolute().parent)
    printed = io.StringIO()
    with _WRITING[format](filepath) as partial, contextlib.redirect_stdout(printed):
        model.export(str(partial), format=format, **kwargs)
    print(printed.getvalue().replace(str(partial), str(filepath)), end="")


def signature(model):
    """Returns the input signature of an export.

    Args:
        model: A built `keras.Model`.

    Raises:
        ValueError: If the inputs of the model are not known.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> [spec.shape for spec in signature(model)]
    [(None, 3)]
    """
    specs = input_specs(model)
    if specs is None:
        raise ValueError(
            "`export()` needs the input signature. Received: "
            f"the model '{model.name}' of class {type(model).__name__}, which was never called. "
            "Call it on a batch first, or pass `input_signature`, for instance "
            "[keras.InputSpec(shape=(None, 8), dtype='float32')]."
        )
    if not keras_internals.is_functional(model):
        specs = tree.map_structure(_as_predicted, specs)
    return [specs]


def _as_predicted(spec):
    # A subclassed model records the inputs of its layers; `predict` passes floats of the default
    # dtype. A name would count the tensors of this process.
    is_float = keras.backend.is_float_dtype(spec.dtype)
    return keras.InputSpec(
        keras.config.floatx() if is_float else spec.dtype, (None, *spec.shape[1:])
    )
