"""A model is exported whole or not at all, to be served where this package is not."""

import contextlib
import io
import pathlib
import re

import keras
from keras import tree

from polyak_model.average.clone_check import input_specs
from polyak_model.backend import keras_internals
from polyak_model.weight_files.atomic_write import atomic_file, atomic_folder

_SAVED_MODEL = ("assets", "fingerprint.pb", "saved_model.pb", "variables")
_WRITING = {
    "tf_saved_model": lambda path: atomic_folder(path, _SAVED_MODEL),
    "onnx": atomic_file,
    "litert": atomic_file,
}
_REMOTE = re.compile(r"[a-z0-9]+://")


def export(model, filepath, format, **kwargs):
    """Exports a model as Keras does, and leaves what lies at `filepath` if that fails.

    Args:
        model: A built `keras.Model`.
        filepath: Where, a string or path.
        format: As in `keras.Model.export`, like the arguments after it. What
            Keras writes as several files, or to a remote file system
            (`gs://...`), it writes by itself.
        **kwargs: Passed on.

    Raises:
        OSError: If the artifact cannot be written; its message names `filepath`.
    """
    if format not in _WRITING or _REMOTE.match(str(filepath)):
        model.export(filepath, format=format, **kwargs)
        return
    pathlib.Path(filepath).absolute().parent.mkdir(parents=True, exist_ok=True)
    said = io.StringIO()
    with _WRITING[format](filepath) as partial, contextlib.redirect_stdout(said):
        model.export(str(partial), format=format, **kwargs)
    print(said.getvalue().replace(str(partial), str(filepath)), end="")


def signature(model):
    """Returns the input signature of an export.

    Args:
        model: A built `keras.Model`.

    Raises:
        ValueError: If the model tells nothing of its inputs.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> [spec.shape for spec in signature(model)]
    [(None, 3)]
    """
    specs = input_specs(model)
    if specs is None:
        raise ValueError(
            "`export()` needs to know what the model takes. Received: "
            f"the model '{model.name}' of class {type(model).__name__}, which was never called. "
            "Call it on a batch first, or pass `input_signature`, for instance "
            "[keras.InputSpec(shape=(None, 8), dtype='float32')]."
        )
    if not keras_internals.is_functional(model):
        specs = tree.map_structure(_as_predicted, specs)
    return [specs]


def _as_predicted(spec):
    # A subclassed model knows what its layers got; `predict` gives it floats of the default dtype.
    # A name would count the tensors of this process.
    is_float = keras.backend.is_float_dtype(spec.dtype)
    return keras.InputSpec(
        keras.config.floatx() if is_float else spec.dtype, (None, *spec.shape[1:])
    )
