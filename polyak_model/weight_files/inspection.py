"""What a weight file holds: its variables, and how far its average lies from the raw model."""

import math
import typing

import numpy as np

from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.tensor import cut

BLOCK = 2**20


class Distance(typing.NamedTuple):
    """How far the average of a layer lies from its raw weights.

    Attributes:
        layer: Its path inside the model.
        distance: The Euclidean norm of the difference.
        norm: The Euclidean norm of the raw weights.
    """

    layer: str
    distance: float
    norm: float

    @property
    def relative(self):
        """The distance as a share of the norm."""
        if self.norm == 0:
            return math.inf if self.distance else 0.0
        return self.distance / self.norm


def list_variables(weights, group=""):
    """Lists the variables of a model.

    Args:
        weights: A `WeightFile`.
        group: The group in which the model lies. Defaults to "": it is the
            whole file.

    Returns:
        A dict from the path in that group to the variable, without those of
        optimizers; and a dict of the variables of optimizers.

    Example:

    >>> from polyak_model.weight_files.reader import WeightFile
    >>> file = {"layers/dense/vars/0": 1, "optimizer/vars/0": 2, "layers/optimizer_net/vars/0": 3}
    >>> list_variables(WeightFile("a.weights.h5", ".weights.h5", file, {}))
    ({'layers/dense/vars/0': 1, 'layers/optimizer_net/vars/0': 3}, {'optimizer/vars/0': 2})
    """
    inside = f"{group}/" if group else ""
    model, optimizers = {}, {}
    for name, variable in weights.variables.items():
        if name.startswith(inside):
            kind = optimizers if _is_of_optimizer(name) else model
            kind[name.removeprefix(inside)] = variable
    return model, optimizers


def _is_of_optimizer(name):
    # Keras names the groups in "layers" for classes, all others for the attributes of the model.
    parts = name.split("/")
    return any(
        (part == "optimizer" or part.endswith("_optimizer")) and before != "layers"
        for before, part in zip(["", *parts], parts, strict=False)
    )


def find_layer(name):
    """Returns the path of the layer of a variable.

    Example:

    >>> find_layer("layers/dense/vars/0")
    'layers/dense'
    """
    return name.rpartition("/")[0].removesuffix("vars").rstrip("/")


def measure_distances(weights, wrapper):
    """Measures how far the average lies from the raw model, a block of numbers at a time.

    Args:
        weights: A `WeightFile`.
        wrapper: A `Wrapper` in it.

    Returns:
        List of `Distance`, one for each layer that has float variables; those
        are what is averaged.

    Raises:
        InputError: If the two models differ in their variables, or the file is
            damaged.
    """
    raw, _ = list_variables(weights, wrapper.raw)
    average, _ = list_variables(weights, wrapper.average)
    for name in sorted(raw.keys() | average.keys()):
        shapes = [each[name].shape if name in each else None for each in (raw, average)]
        if shapes[0] != shapes[1]:
            raise refusal(
                weights.path,
                f"{name!r} has shape {shapes[0]} in the raw model and {shapes[1]} in the average",
            )
    squares = {}
    for name, variable in raw.items():
        if variable.dtype.startswith(("float", "bfloat")):
            layer = squares.setdefault(find_layer(name), np.zeros(2))
            layer += _sum_squares(variable, average[name])
    return [Distance(layer, *map(float, np.sqrt(sums))) for layer, sums in squares.items()]


def measure_total(distances):
    """Returns the `Distance` of all layers together.

    Example:

    >>> measure_total([Distance("a", 3.0, 6.0), Distance("b", 4.0, 8.0)])
    Distance(layer='total', distance=5.0, norm=10.0)
    """
    return Distance(
        "total",
        math.hypot(*(each.distance for each in distances)),
        math.hypot(*(each.norm for each in distances)),
    )


def _sum_squares(raw, average):
    sums = np.zeros(2)
    for part in cut(raw.shape, BLOCK):
        original = raw.read(part).astype("float64")
        difference = original - average.read(part).astype("float64")
        sums += np.sum(difference**2), np.sum(original**2)
    return sums
