"""How far the average in a file is from the raw weights."""

import math
import typing

import numpy as np

from polyak_model.saving import layout
from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.tensor import cut
from polyak_model.weight_files.training_state import split_variables

_BLOCK = 2**20


class Distance(typing.NamedTuple):
    """How far the average of a layer is from its raw weights.

    Attributes:
        layer: The path of the layer inside the model.
        distance: The Euclidean norm of the difference.
        norm: The Euclidean norm of the raw weights.
    """

    layer: str
    distance: float
    norm: float

    @property
    def relative(self):
        """The distance divided by the norm."""
        if self.norm == 0:
            return math.inf if self.distance else 0.0
        return self.distance / self.norm


def measure_distances(weights, raw, average, shared=()):
    """Computes the distance between average and raw weights of each layer, block by block.

    Args:
        weights: A `WeightFile`.
        raw: Path of the group of the raw model.
        average: Path of the group of the average model.
        shared: Names of variables of the raw model that the average shares.

    Returns:
        List of `Distance`, one for each layer with float variables of its own,
        which are the averaged ones.

    Raises:
        InputError: If the two models differ in their variables, or the file is
            damaged.
    """
    (raw, _), (average, _) = (split_variables(weights, group) for group in (raw, average))
    raw = {name: variable for name, variable in raw.items() if name not in shared}
    for name in sorted(raw.keys() | average.keys()):
        shapes = [each[name].shape if name in each else None for each in (raw, average)]
        if shapes[0] != shapes[1]:
            raise refusal(
                weights.path,
                f"{name!r} has shape {shapes[0]} in the raw model and {shapes[1]} in the average",
            )
    squares = {}
    for name, variable in raw.items():
        if "float" in variable.dtype and not layout.is_lora_alpha(name):
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


def find_layer(name):
    """Returns the path of the layer of a variable.

    Example:

    >>> find_layer("layers/dense/vars/0")
    'layers/dense'
    """
    return name.rpartition("/")[0].removesuffix("vars").rstrip("/")


def _sum_squares(raw, average):
    sums = np.zeros(2)
    for part in cut(raw.shape, _BLOCK):
        original = raw.read(part).astype("float64")
        difference = original - average.read(part).astype("float64")
        sums += np.sum(difference**2), np.sum(original**2)
    return sums
