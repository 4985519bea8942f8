"""The layout of the files of a PolyakModel, stated once for writer and reader.

A file of weights has these groups; in a `.keras` file they are in its
`model.weights.h5`:

    average_model/...               the average model, as Keras saves it
    layers/<raw model>/...          the raw model with its optimizer
    layers/shadow/vars/0            int64, the optimizer steps since averaging started
    layers/shadow/vars/1            int64, the fingerprint of the newest iterate, or 0
    layers/shadow/vars/2, ...       master copies and residuals of the average
    layers/shadow/vars/seed_0, ...  states of seed generators, of the raw model first
    layers/shadow/vars/description  uint8, the description as JSON

The group `shadow` is named by Keras after the class `Shadow`, the raw model's
after its class; of two equal names the second ends in `_1`. The description has
the keys `format`, `version`, `run`, `rule` and `weights`. Files of every format
up to `FORMAT` can be loaded.
"""

import json
import math
import re
import uuid

import numpy as np

import polyak_model

FORMAT = 1
AVERAGE = "average_model"
LAYERS = "layers"
OPTIMIZER = "optimizer"
STATE = re.compile(r"shadow(_\d+)?")
STEP = "0"
DESCRIPTION = "description"
# Keys of the config in a `.keras` file.
CONFIG_MODEL = "model"
CONFIG_RULE = "average"


def seed_name(index):
    """Returns the name of the state of a seed generator in the state group."""
    return f"seed_{index}"


def variable_path(group, name):
    """Returns the path of a variable of a group.

    Example:

    >>> variable_path("layers/shadow", STEP)
    'layers/shadow/vars/0'
    """
    return f"{group}/vars/{name}"


def new_run():
    """Returns a unique identifier of a training run, a string.

    It is independent of Keras's seeds: the same program executed again is
    another run.
    """
    return uuid.uuid4().hex


def describe(rule, run, weights):
    """Returns the description of an average.

    Args:
        rule: The rule as Keras serializes it, a dict.
        run: A string, see `new_run`.
        weights: The weights of the raw model.

    Returns:
        A dict that can be encoded as JSON.
    """
    return {
        "format": FORMAT,
        "version": polyak_model.__version__,
        "run": run,
        "rule": rule,
        "weights": [[weight.path, list(weight.shape), str(weight.dtype)] for weight in weights],
    }


def encode(description):
    """Returns a description as a uint8 array, since Keras's files store only arrays."""
    return np.frombuffer(json.dumps(description).encode(), "uint8")


def decode(array):
    """Returns the description in an array.

    Args:
        array: A uint8 array as returned by `encode`.

    Returns:
        A dict with the keys `format`, `version`, `run`, `rule` and `weights`.

    Raises:
        ValueError: If the array contains no description, or one of a newer
            format.

    Example:

    >>> description = describe({"class_name": "UniformAverage"}, run="4f2a", weights=[])
    >>> decode(encode(description)) == description
    True
    """
    try:
        description = json.loads(np.asarray(array, "uint8").tobytes())
        number, version = description["format"], description["version"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged(repr(error)) from error
    check_format(number, version)
    for key, kind in (("run", str), ("rule", dict), ("weights", list)):
        if not isinstance(description.get(key), kind):
            raise _damaged(f"{key!r} is {description.get(key)!r}")
    for entry in description["weights"]:
        if not _describes_weight(entry):
            raise _damaged(f"'weights' contains {entry!r}")
    return description


def _describes_weight(entry):
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    path, shape, dtype = entry
    return (
        isinstance(path, str)
        and isinstance(shape, list)
        and all(isinstance(length, int) and length >= 0 for length in shape)
        and isinstance(dtype, str)
    )


def _damaged(problem):
    return ValueError(
        f"The description of the average in the file is damaged: {problem[:200]}. Use another file."
    )


def check_format(number, version="of a later date"):
    """Checks that no newer version of this package wrote the file.

    Args:
        number: The format of the file, an int.
        version: The version of the package that wrote it, if known.

    Raises:
        ValueError: If the format is newer than `FORMAT`, or is not an int.
    """
    if not isinstance(number, int):
        raise _damaged(f"'format' is {number!r}")
    if number > FORMAT:
        raise ValueError(
            f"The file has format {number}, written by polyak_model {version}; expected at most "
            f"{FORMAT}, the format of polyak_model {polyak_model.__version__}. Upgrade with "
            "pip install --upgrade polyak_model"
        )


def has_same_weights(description, weights):
    """Returns whether a file describes weights of the same shapes, in the same order.

    Args:
        description: A dict returned by `decode`.
        weights: The weights of the raw model.
    """
    described = [tuple(shape) for _, shape, _ in description["weights"]]
    return described == [tuple(weight.shape) for weight in weights]


def check_weights(description, weights):
    """Checks that a file describes a model of the same architecture.

    LoRA is no part of it: Keras merges it into the kernels of a file, and loads
    them into a model with LoRA or without.

    Args:
        description: A dict returned by `decode`.
        weights: The weights of the raw model.

    Raises:
        ValueError: If the shapes or the number of weights differ.
    """
    described = [entry for entry in description["weights"] if not _belongs_to_lora(entry[0])]
    weights = [weight for weight in weights if not _belongs_to_lora(weight.path)]
    for (path, shape, _), weight in zip(described, weights, strict=False):
        if tuple(shape) != tuple(weight.shape):
            raise ValueError(
                f"The file contains another architecture: its weight '{path}' has shape "
                f"{tuple(shape)}, where the model has '{weight.path}' of shape "
                f"{tuple(weight.shape)}. Build the model as it was when it was saved."
            )
    if len(described) != len(weights):
        parameters = sum(math.prod(shape) for _, shape, _ in described)
        raise ValueError(
            f"The file contains another architecture: {len(described)} weights with "
            f"{parameters:,} parameters, where the model has {len(weights)} with "
            f"{sum(math.prod(weight.shape) for weight in weights):,}. Build the model as it was "
            "when it was saved."
        )


def _belongs_to_lora(path):
    return path.rpartition("/")[2].startswith("lora_")
