"""Two models answering together: how their answers are joined."""

import math

import keras
from keras import ops, tree

from polyak_model.backend.keras_internals import forward


def join(combine, answers):
    """Joins the answers of several models into one.

    Args:
        combine: `"mean"`: the mean of the answers. `"softmax"`: the answers are
            logits, and the joined one is the logarithm of the mean of their
            probabilities. Or a callable from a list of answers to one.
        answers: List of outputs, nested structures of one shape.

    Returns:
        An output of the same structure.

    Raises:
        ValueError: If `combine` changes the structure or the shapes, or joins
            integers by a mean.

    Example:

    >>> join("mean", [ops.array([1.0, 2.0]), ops.array([3.0, 6.0])]).numpy().tolist()
    [2.0, 4.0]
    """
    if callable(combine):
        joined = combine(answers)
        _check_same_structure(combine, answers[0], joined)
        return joined
    return tree.map_structure(lambda *leaves: _JOIN[combine](leaves), *answers)


def _mean(leaves):
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(leaves[0].dtype)):
        raise ValueError(
            "`combine='mean'` averages outputs that are floats. Received: an output of dtype "
            f"{keras.backend.standardize_dtype(leaves[0].dtype)}. Pass `combine`, a callable from "
            "the list of outputs to one, or use inference='average'."
        )
    return sum(leaves) / len(leaves)


def _log_mean_softmax(leaves):
    log_probabilities = ops.stack([ops.log_softmax(logits, axis=-1) for logits in leaves])
    return ops.logsumexp(log_probabilities, axis=0) - math.log(len(leaves))


_JOIN = {"mean": _mean, "softmax": _log_mean_softmax}


def check_combine(combine):
    """Returns `combine`, or raises `ValueError`.

    Args:
        combine: Anything.
    """
    if not callable(combine) and (not isinstance(combine, str) or combine not in _JOIN):
        raise ValueError(
            "`combine` must be 'mean', 'softmax' or a callable from a list of outputs to one. "
            f"Received: combine={combine!r}."
        )
    return combine


def _check_same_structure(combine, expected, received):
    def shapes(outputs):
        return tree.map_structure(lambda leaf: str(tuple(leaf.shape)), outputs)

    try:
        tree.assert_same_structure(expected, received)
        same = tree.flatten(shapes(expected)) == tree.flatten(shapes(received))
    except (ValueError, TypeError):
        same = False
    if not same:
        raise ValueError(
            "`combine` must return one output of the structure and shapes of a single model's. "
            f"Expected: {shapes(expected)}. Received: {shapes(received)}, from combine={combine!r}."
        )


class Ensemble(keras.Model):
    """The raw and the average model answering together; it holds the metrics of their answer.

    Args:
        members: The raw and the average model.
        combine: How, see `join`.
    """

    def __init__(self, members, combine):
        # Inputs reach the members as they are.
        super().__init__(name="ensemble", autocast=False)
        # Not as a list: in one the oldest Keras finds no lookup tables to export.
        self.raw, self.average = members
        self.combine = combine
        self.built = True  # Its weights are those of the members.
        if hasattr(members[0], "output_names"):
            self.output_names = members[0].output_names

    @property
    def members(self):
        """The models whose answers are joined."""
        return [self.raw, self.average]

    @property
    def losses(self):
        """The mean of the members' penalties, so that losses of routes compare."""
        penalties = [ops.sum(loss) for member in self.members for loss in member.losses]
        return [sum(penalties) / len(self.members)] if penalties else []

    def call(self, inputs):
        return join(self.combine, [forward(member, inputs) for member in self.members])
