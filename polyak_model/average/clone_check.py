"""Whether two models answer alike, asked with a small batch."""

import contextlib
import warnings

import keras
import numpy as np
from keras import tree

from polyak_model.backend.keras_internals import forward

# One forward pass with the same values gives the same outputs up to the order of sums, which
# threads may change; state left behind by the clone (an adapted mean, a table) shows far above it.
_OUTPUT_TOLERANCE = 1e-3

# Sizes that a probe takes where the inputs leave them open; a convolution may need a large one.
_PROBE_SIZES = (1, 32, 128)


def check_disjoint(model, clone):
    """Raises `ValueError` if the two models share a variable.

    Args:
        model: A `keras.Model`.
        clone: A `keras.Model`.
    """
    owned = {id(variable) for variable in model.variables}
    for variable in clone.variables:
        if id(variable) in owned:
            raise ValueError(
                f"The clone of the model '{model.name}' shares the variable '{variable.path}' with "
                "it, so the average would overwrite what is trained. Build every layer afresh in "
                "`clone_function` (or in the model's `from_config`) instead of reusing live ones."
            )


def pair_weights(model, clone):
    """Pairs the weights of a model with those of its clone.

    Args:
        model: A built `keras.Model`.
        clone: A built `keras.Model`.

    Returns:
        A tuple of pairs `(weight of model, weight of clone)`, in the order of
        `model.weights`.

    Raises:
        ValueError: If the architectures differ; it names the first variable that
            does.
    """
    pairs = tuple(zip(model.weights, clone.weights, strict=False))
    for weight, copy in pairs:
        expected = f"shape {tuple(weight.shape)}, dtype {weight.dtype}"
        received = f"shape {tuple(copy.shape)}, dtype {copy.dtype}"
        if expected != received:
            raise ValueError(
                "The clone must have the architecture of the model. The first variable that "
                f"differs is '{weight.path}' of {expected}. Received in the clone: '{copy.path}' "
                f"of {received}. Make `clone_function` return the same architecture."
            )
    if len(model.weights) != len(clone.weights):
        longer = max(model, clone, key=lambda candidate: len(candidate.weights))
        extra = longer.weights[len(pairs)]
        raise ValueError(
            f"The clone must have the architecture of the model '{model.name}', which has "
            f"{len(model.weights)} weights. Received a clone with {len(clone.weights)}; the first "
            f"variable without a partner is '{extra.path}' of shape {tuple(extra.shape)}. Make "
            "`clone_function` return the same architecture."
        )
    return pairs


def check_same_outputs(model, clone, inputs):
    """Raises `ValueError` unless both models answer alike, given the same state.

    Nothing is changed by the check: both passes run without side effects, the
    clone with all values of the model, seeds included.

    Args:
        model: A built `keras.Model`.
        clone: Its clone, with the same weights.
        inputs: A `keras.KerasTensor`, or a nested structure of them, that the
            model takes; or None if that is not known, and nothing is checked.
    """
    values = [keras.ops.convert_to_tensor(variable) for variable in model.variables]
    # A clone made by `clone_function` may leave out layers without weights, such as dropout.
    alike = len(model.variables) == len(clone.variables)
    state = list(zip(clone.variables, values, strict=True)) if alike else []
    probe, expected = _answer_to_a_probe(model, inputs)
    if probe is None:
        return
    try:
        with _rehearsal(state):
            received = forward(clone, probe)
    except Exception as error:
        raise ValueError(
            f"The model '{model.name}' answers, but its clone fails: {error}\nKeras copies no "
            "variables that a Lambda layer refers to, for instance. Pass `clone_function`, a "
            "function without arguments that returns a fresh model of the same architecture."
        ) from error
    tree.assert_same_structure(expected, received)
    for ours, theirs in zip(tree.flatten(expected), tree.flatten(received), strict=True):
        if not _agree(keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs)):
            raise ValueError(
                f"The clone of the model '{model.name}' has the same weights but other outputs, so "
                "the model holds state outside its weights (an adapted layer or a lookup table, "
                "for instance) that its `get_config()` leaves out. Pass `clone_function`, a "
                "function that returns a fresh model with that state."
            )


def _agree(expected, received):
    if expected.shape != received.shape:
        return False
    if not np.issubdtype(expected.dtype, np.inexact):
        return np.array_equal(expected, received)
    expected, received = expected.astype("float64"), received.astype("float64")
    scale = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
    return np.allclose(expected, received, rtol=0, atol=_OUTPUT_TOLERANCE * scale, equal_nan=True)


@contextlib.contextmanager
def _rehearsal(state=()):
    # What a model has to say about random inputs concerns nobody.
    with keras.StatelessScope(state_mapping=state), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _answer_to_a_probe(model, inputs):
    """Returns a small batch and the model's answer to it, or None twice."""
    if inputs is None:
        return None, None
    for size in _PROBE_SIZES:
        probe = tree.map_structure(lambda spec, size=size: _probe(spec, size), inputs)
        try:
            with _rehearsal():
                return probe, forward(model, probe)
        except Exception as error:
            failure = error
    warnings.warn(
        f"The outputs of the clone were not compared with those of the model '{model.name}', which "
        f"fails on random inputs: {failure}\nTheir weights are the same; compare the two on inputs "
        "of your own if the model holds state outside its weights.",
        stacklevel=2,
    )
    return None, None


def input_specs(model):
    """Returns what a built model takes.

    Args:
        model: A `keras.Model`.

    Returns:
        A `keras.KerasTensor` or a nested structure of them, or None if the
        model tells nothing of its inputs.
    """
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError):  # A subclassed model declares no inputs.
        shape = (model.get_build_config() or {}).get("input_shape")
        return shape and tree.map_shape_structure(keras.KerasTensor, shape)


def _probe(spec, size):
    if spec is None:
        return None
    shape = [size if known is None else known for known in spec.shape]
    if spec.shape and spec.shape[0] is None:
        shape[0] = 1
    if spec.dtype == "string":
        return keras.ops.convert_to_tensor(np.full(shape, ""))
    values = np.random.default_rng(0).random(shape)
    return keras.ops.convert_to_tensor(values, dtype=spec.dtype)
