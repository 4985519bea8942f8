"""What a file of a PolyakModel says of itself: format, run, rule, weights."""

import json
import math
import uuid

import keras
import numpy as np

import polyak_model

FORMAT = 1
KEY = "description"


def new_run():
    """Returns a name, a string, that no other training has.

    It does not depend on Keras's seeds: the same program run again is another
    training.
    """
    return uuid.uuid4().hex


def describe(rule, run, weights):
    """Describes an average.

    Args:
        rule: A `polyak_model.rules.Rule`.
        run: A string, see `new_run`.
        weights: The weights of the raw model.

    Returns:
        A dict that JSON can hold.
    """
    return {
        "format": FORMAT,
        "version": polyak_model.__version__,
        "run": run,
        "rule": keras.saving.serialize_keras_object(rule),
        "weights": [[weight.path, list(weight.shape), str(weight.dtype)] for weight in weights],
    }


def encode(description):
    """Returns a description as an array, since Keras's files hold only arrays."""
    return np.frombuffer(json.dumps(description).encode(), "uint8")


def decode(array):
    """Returns the description in an array.

    Args:
        array: What `encode` returned.

    Raises:
        ValueError: If a newer version of this package wrote it, or it is none.

    Example:

    >>> decode(encode({"format": 1, "version": "0.1.0"}))["format"]
    1
    """
    try:
        description = json.loads(np.asarray(array, "uint8").tobytes())
        number, version = int(description["format"]), description["version"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"The file's description of itself cannot be read: {error!r}.") from error
    check_format(number, version)
    return description


def check_format(number, version="of a later date"):
    """Raises `ValueError` if a newer version of this package wrote a file.

    Args:
        number: The format of the file.
        version: The version of the package that wrote it, if it is known.
    """
    if number > FORMAT:
        raise ValueError(
            f"The file has format {number}, written by a polyak_model {version}; expected at most "
            f"{FORMAT}, which polyak_model {polyak_model.__version__} knows. Upgrade with "
            "pip install --upgrade polyak_model"
        )


def check_weights(description, weights):
    """Raises `ValueError` unless a file describes a model of the same architecture.

    Args:
        description: What `decode` returned.
        weights: The weights of the raw model.
    """
    described = description["weights"]
    for (path, shape, _), weight in zip(described, weights, strict=False):
        if tuple(shape) != tuple(weight.shape):
            raise ValueError(
                f"The file holds another architecture: its weight '{path}' has shape "
                f"{tuple(shape)}, where the model has '{weight.path}' of shape "
                f"{tuple(weight.shape)}. Build the model as it was when it was saved."
            )
    if len(described) != len(weights):
        parameters = sum(math.prod(shape) for _, shape, _ in described)
        raise ValueError(
            f"The file holds another architecture: {len(described)} weights with {parameters:,} "
            f"parameters, where the model has {len(weights)} with "
            f"{sum(math.prod(weight.shape) for weight in weights):,}. Build the model as it was "
            "when it was saved."
        )
