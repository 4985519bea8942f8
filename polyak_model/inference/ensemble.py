"""How the outputs of several models become one."""

import math

import keras
from keras import ops, tree


def join(combine, outputs):
    """Joins the outputs of several models into one.

    Args:
        combine: `"mean"`: the mean of the outputs. `"softmax"`: the outputs are
            logits, and the joined one is the logarithm of the mean of their
            probabilities. Or a callable from a list of outputs to one.
        outputs: List of outputs, nested structures of equal shapes.

    Returns:
        An output of the same structure.

    Raises:
        ValueError: If `combine` changes the structure or the shapes, or outputs
            of integers have no mean.

    Example:

    >>> join("mean", [ops.array([1.0, 2.0]), ops.array([3.0, 6.0])]).numpy().tolist()
    [2.0, 4.0]
    """
    if callable(combine):
        joined = combine(outputs)
        _check_same_structure(combine, outputs[0], joined)
        return joined
    return tree.map_structure(lambda *leaves: _JOIN[combine](leaves), *outputs)


def _mean(leaves):
    dtype = keras.backend.standardize_dtype(leaves[0].dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            f"`combine='mean'` needs outputs of floats. Received: an output of dtype {dtype}. Pass "
            "`combine`, a callable from the list of outputs to one, or use inference='average'."
        )
    return sum(leaves) / len(leaves)


def _log_mean_softmax(leaves):
    log_probabilities = ops.stack([ops.log_softmax(logits, axis=-1) for logits in leaves])
    return ops.logsumexp(log_probabilities, axis=0) - math.log(len(leaves))


_JOIN = {"mean": _mean, "softmax": _log_mean_softmax}


def check_combine(combine):
    """Returns `combine`, or raises `ValueError` if outputs cannot be joined so."""
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
