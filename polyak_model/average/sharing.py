"""Which weights of a model its averages share with it."""

import warnings

import keras

from polyak_model.backend.keras_internals import frozen_weights


def check_share_frozen(share_frozen, clone_function):
    """Returns the argument `share_frozen` of `PolyakModel`, or raises `ValueError`.

    Args:
        share_frozen: See `PolyakModel`.
        clone_function: Likewise.
    """
    if not isinstance(share_frozen, bool):
        raise ValueError(
            f"`share_frozen` must be True or False. Received: share_frozen={share_frozen!r}."
        )
    if share_frozen and clone_function is not None:
        raise ValueError(
            "`share_frozen=True` needs a copy that refers to the frozen variables of the model, "
            f"and what a `clone_function` returns has its own. Received: clone_function="
            f"{clone_function!r}. Remove one of the two arguments."
        )
    return share_frozen


def find_shared(model, share_frozen):
    """Returns the weights of a model that its averages share, a list.

    Args:
        model: A built `keras.Model`.
        share_frozen: Bool. Whether they share any.

    Raises:
        ValueError: If nothing is left to be averaged.
    """
    if not share_frozen:
        return []
    shared = frozen_weights(model)
    if not shared:
        warnings.warn(
            f"Nothing is shared by share_frozen=True, since no weight of the model '{model.name}' "
            "is frozen. To share weights, freeze them before the model is wrapped.",
            stacklevel=2,
        )
    known = set(map(id, shared))
    floats = [w for w in model.weights if keras.backend.is_float_dtype(w.dtype)]
    if floats and all(id(weight) in known for weight in floats):
        raise ValueError(
            f"`share_frozen=True` leaves nothing to average: all {len(model.weights)} weights of "
            f"the model '{model.name}' are frozen. Unfreeze what is to be trained, then wrap the "
            "model."
        )
    return shared
