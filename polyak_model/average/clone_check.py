"""Whether a clone has variables of its own, the same weights and the same outputs as its model."""

import contextlib
import warnings

import keras
import numpy as np
from keras import tree

from polyak_model import backend
from polyak_model.backend.keras_internals import forward

# Threads may change the order of sums; state that is missing in the clone (an adapted mean, a
# lookup table) changes outputs far more.
_OUTPUT_TOLERANCE = 1e-3

# Sizes of a probe where the inputs leave them open; a convolution may need a large one.
_PROBE_SIZES = (1, 32, 128)


def check_disjoint(model, clone, shared=()):
    """Raises `ValueError` if two models share a variable.

    Args:
        model: A `keras.Model`.
        clone: A `keras.Model`.
        shared: Variables that they may share. Defaults to none.
    """
    owned = {id(variable) for variable in model.variables} - set(map(id, shared))
    for variable in clone.variables:
        if id(variable) in owned:
            raise ValueError(
                f"The clone of the model '{model.name}' shares the variable '{variable.path}' with "
                "it, so the average would overwrite what is trained. Create every layer anew in "
                "`clone_function` instead of reusing existing ones."
            )


def have_same_weights(model, clone):
    """Returns whether two models have weights of the same shapes and dtypes, in the same order."""
    one, other = ([(tuple(w.shape), w.dtype) for w in m.weights] for m in (model, clone))
    return one == other


def pair_weights(model, clone):
    """Pairs the weights of a model with those of its clone.

    Args:
        model: A built `keras.Model`.
        clone: A built `keras.Model`.

    Returns:
        A tuple of pairs `(weight of model, weight of clone)`, in the order of
        `model.weights`.

    Raises:
        ValueError: If the architectures differ. The message names the first
            variable that does.
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
            f"{len(model.weights)} weights. Received: a clone with {len(clone.weights)}; the first "
            f"variable without a partner is '{extra.path}' of shape {tuple(extra.shape)}. Make "
            "`clone_function` return the same architecture."
        )
    return pairs


def check_same_outputs(model, clone, inputs):
    """Raises `ValueError` unless both models return the same outputs for a small random batch.

    The check changes nothing: both calls run without side effects on variables
    and generators. A model that fails on random inputs is not checked.

    Args:
        model: A built `keras.Model`.
        clone: Its clone, with the same weights.
        inputs: What the model takes, a `keras.KerasTensor` or a nested structure
            of them; or None if it is unknown, and nothing is checked.
    """
    if inputs is None:
        return
    with backend.unchanged_generators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # They concern random inputs.
        _compare(model, clone, inputs)


def _compare(model, clone, inputs):
    values = [keras.ops.convert_to_tensor(variable) for variable in model.variables]
    # What `clone_function` returns may lack layers without weights, such as dropout.
    alike = len(model.variables) == len(clone.variables)
    state = list(zip(clone.variables, values, strict=True)) if alike else ()
    probe, expected = _first_outputs(model, inputs)
    if probe is None:
        return
    try:
        with keras.StatelessScope(state_mapping=state):
            received = forward(clone, probe)
    except Exception as error:
        # Code of the user's own may raise anything.
        raise ValueError(
            f"The model '{model.name}' can be called, but its clone fails: {error}\nPass "
            "`clone_function`, a function without arguments that returns a fresh model of the same "
            "architecture."
        ) from error
    tree.assert_same_structure(expected, received)
    for ours, theirs in zip(tree.flatten(expected), tree.flatten(received), strict=True):
        if not _agree(backend.fetch(ours), backend.fetch(theirs)):
            raise ValueError(
                f"The clone of the model '{model.name}' has the same weights but other outputs, so "
                "it lacks state that the model holds outside its weights (an adapted layer or a "
                "lookup table, for instance). Pass `clone_function`, a function without arguments "
                "that returns a fresh model with that state."
            )


def _agree(expected, received):
    if expected.shape != received.shape:
        return False
    if not np.issubdtype(expected.dtype, np.inexact):
        return np.array_equal(expected, received)
    expected, received = expected.astype("float64"), received.astype("float64")
    scale = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
    return np.allclose(expected, received, rtol=0, atol=_OUTPUT_TOLERANCE * scale, equal_nan=True)


def _first_outputs(model, inputs):
    """Returns a small batch that a model can be called with, and its outputs; or None twice."""
    for size in _PROBE_SIZES:
        probe = tree.map_structure(lambda spec, size=size: _probe(spec, size), inputs)
        # A model may refuse inputs of any size or value, in any way.
        with contextlib.suppress(Exception), keras.StatelessScope():
            return probe, forward(model, probe)
    return None, None


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


def input_specs(model):
    """Returns the inputs of a built model.

    Args:
        model: A `keras.Model`.

    Returns:
        A `keras.KerasTensor` or a nested structure of them, or None if they are
        unknown.
    """
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError):  # A subclassed model declares no inputs.
        shape = (model.get_build_config() or {}).get("input_shape")
        return shape and tree.map_shape_structure(keras.KerasTensor, shape)
