"""The layout of the files of a PolyakModel, stated once for writer and reader.

A file of weights has these groups; in a `.keras` file they are in its
`model.weights.h5`:

    vars/description              uint8, the description as JSON
    averages/<name>/...           each average model, as Keras saves it
    raw_model/...                 the raw model with its optimizer
    shadow/vars/step              integer, the optimizer steps since averaging started
    shadow/vars/fingerprint       integer, the fingerprint of the newest iterate, or 0
    shadow/vars/<name>.origin     integer, the step at which the average was added, or 0
    shadow/vars/<name>.master.3   master copy of the average of the raw weight number 3
    shadow/vars/<name>.residual.3 its residual, if averages are compensated
    shadow/vars/<name>.seed_0     state of a seed generator; of the raw model, `raw.seed_0`

A single average is called `average`. The description has the keys `format`,
`version`, `run`, `averages` (rules by name, the first average first),
`compensated`, `weights` and `excluded`.

Weights that averages share with the raw model are in its group alone. Where a
layer has LoRA then, `vars` contains its kernel as it is, the factors by their
names and `lora_alpha`, in all groups. The description has the key `shared` then,
and the format is `FORMAT_IF_SHARED`, so that earlier versions refuse the file.

In format 1, the groups of a single average were `average_model`, `layers/<class
of the raw model>` and `layers/shadow`, named by Keras after the class `Shadow`;
of two equal names the second ends in `_1`. The description was in the latter,
with the key `rule`. Files of every format so far can be loaded.
"""

import json
import math
import re
import uuid

import numpy as np

import polyak_model

FORMAT = 2
FORMAT_IF_SHARED = 3
AVERAGES = "averages"
RAW = "raw_model"
STATE = "shadow"
OPTIMIZER = "optimizer"
DESCRIPTION = "description"
STEP = "step"
FINGERPRINT = "fingerprint"
LORA_ALPHA = "lora_alpha"
# The name of a single average.
ONLY = "average"
# Groups of format 1, and the name of the step.
AVERAGE_1 = "average_model"
LAYERS_1 = "layers"
STATE_1 = re.compile(r"shadow(_\d+)?")
STEP_1 = "0"
# Keys of the config in a `.keras` file.
CONFIG_MODEL = "model"
CONFIG_RULE = "average"


def average_group(name):
    """Returns the group of an average model."""
    return f"{AVERAGES}/{name}"


def layer_groups_of_format_1(kind):
    """Returns the groups of the raw model and of the state in a file of format 1.

    Args:
        kind: Name of the class of the raw model.

    Example:

    >>> layer_groups_of_format_1("DenseNet")
    ('layers/dense_net', 'layers/shadow')
    """
    # As Keras does it.
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
    name = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
    return f"{LAYERS_1}/{name}", f"{LAYERS_1}/shadow{'_1' * (name == 'shadow')}"


def origin_name(average):
    """Returns the name of the origin of an average in the state group."""
    return f"{average}.origin"


def master_name(average, index):
    """Returns the name of a master copy in the state group."""
    return f"{average}.master.{index}"


def residual_name(average, index):
    """Returns the name of a residual in the state group."""
    return f"{average}.residual.{index}"


def seed_name(owner, index):
    """Returns the name of the state of a seed generator in the state group."""
    return f"{owner}.seed_{index}"


def variable_path(group, name):
    """Returns the path of a variable of a group, "" for the whole file.

    Example:

    >>> variable_path("shadow", STEP), variable_path("", DESCRIPTION)
    ('shadow/vars/step', 'vars/description')
    """
    return f"{group}/vars/{name}".removeprefix("/")


def new_run():
    """Returns a unique identifier of a training run, a string.

    It is independent of Keras's seeds: the same program executed again is
    another run.
    """
    return uuid.uuid4().hex


def describe(rules, run, compensated, weights, excluded=(), shared=()):
    """Returns the description of averages.

    Args:
        rules: Dict with the rule of each average, as Keras serializes it.
        run: A string, see `new_run`.
        compensated: Bool. Whether averages have residuals.
        weights: The weights of the raw model.
        excluded: Positions of the weights that are not averaged.
        shared: Positions of those that averages share with the raw model.

    Returns:
        A dict that can be encoded as JSON.
    """
    sharing = {"shared": list(shared)} if shared else {}
    return {
        "format": FORMAT_IF_SHARED if shared else FORMAT,
        "version": polyak_model.__version__,
        "run": run,
        "averages": rules,
        "compensated": compensated,
        "weights": [[weight.path, list(weight.shape), str(weight.dtype)] for weight in weights],
        "excluded": list(excluded),
        **sharing,
    }


def encode(description):
    """Returns a description as a uint8 array, since Keras's files store only arrays."""
    return np.frombuffer(json.dumps(description).encode(), "uint8")


def decode(array):
    """Returns the description in an array.

    Args:
        array: A uint8 array as returned by `encode`.

    Returns:
        A dict, see `describe`; one of format 1 has the key `rule` instead of
        `averages`, `compensated` and `excluded`.

    Raises:
        ValueError: If the array contains no description, or one of a newer
            format.

    Example:

    >>> rules = {"short": {"class_name": "UniformAverage"}}
    >>> description = describe(rules, run="4f2a", compensated=False, weights=[])
    >>> decode(encode(description)) == description
    True
    """
    try:
        description = json.loads(np.asarray(array, "uint8").tobytes())
        number, version = description["format"], description["version"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise damaged(repr(error)) from error
    check_format(number, version)
    own = (
        {"rule": dict} if number == 1 else {"averages": dict, "compensated": bool, "excluded": list}
    )
    own |= {"shared": list} if number == FORMAT_IF_SHARED else {}
    for key, kind in ({"run": str, "weights": list} | own).items():
        if not isinstance(description.get(key), kind):
            raise damaged(f"{key!r} is {description.get(key)!r}")
    for name, rule in description.get("averages", {}).items():
        if not name.isidentifier() or not isinstance(rule, dict):
            raise damaged(f"'averages' contains {name!r}: {rule!r}")
    for key in ("excluded", "shared"):
        for position in description.get(key, ()):
            if not isinstance(position, int) or not 0 <= position < len(description["weights"]):
                raise damaged(f"{key!r} contains {position!r}")
    for entry in description["weights"]:
        if not _describes_weight(entry):
            raise damaged(f"'weights' contains {entry!r}")
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


def damaged(problem):
    """Returns the error for a file whose description is damaged."""
    return ValueError(
        f"The description of the average in the file is damaged: {problem[:200]}. Use another file."
    )


def check_format(number, version="of a later date"):
    """Checks that no newer version of this package wrote the file.

    Args:
        number: The format of the file, an int.
        version: The version of the package that wrote it, if known.

    Raises:
        ValueError: If the format is newer than `FORMAT_IF_SHARED`, or is not an int.
    """
    if not isinstance(number, int):
        raise damaged(f"'format' is {number!r}")
    if number > FORMAT_IF_SHARED:
        raise ValueError(
            f"The file has format {number}, written by polyak_model {version}; expected at most "
            f"{FORMAT_IF_SHARED}, the format of polyak_model {polyak_model.__version__}. Install "
            "that version or a newer one."
        )


def check_names(description, names):
    """Checks that a file and a model have an average in common.

    Args:
        description: A dict returned by `decode`.
        names: The names of the averages of the model.

    Raises:
        ValueError: If they have none.
    """
    saved = list(description["averages"])
    if not set(saved).intersection(names):
        raise ValueError(
            f"The file contains the {_listed(saved)}, the model has the {_listed(names)}: none in "
            "common. Wrap the model with the names of the file; those that only one of them has "
            "may differ. The raw model alone is loaded by model.raw_model.load_weights, from a "
            "file that `polyak-model extract --contents raw` writes."
        )


def _listed(names):
    return f"average{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"


def check_compensated(description, compensated):
    """Checks that both a file and a model are compensated, or none.

    Args:
        description: A dict returned by `decode`.
        compensated: Bool, as in `PolyakModel`.

    Raises:
        ValueError: If they differ.
    """
    saved = description["compensated"]
    if saved != compensated:
        raise ValueError(
            f"The file was written by a model with compensated={saved}. Received: a model with "
            f"compensated={compensated}. Wrap the model with compensated={saved}."
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


def is_lora_alpha(path):
    """Returns whether a variable in a file is the scale of LoRA, which is no parameter."""
    return path.rpartition("/")[2] == LORA_ALPHA


def _belongs_to_lora(path):
    return path.rpartition("/")[2].startswith("lora_")
