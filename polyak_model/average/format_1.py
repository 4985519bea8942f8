"""Reads the state of an average from files of format 1, whose variables have no names.

They are the step and the fingerprint, and then, for each averaged weight in
order, a master copy if the weight has 16 bits, and a residual if the average is
compensated.
"""

import keras

from polyak_model.backend import keras_internals
from polyak_model.saving import layout


def read(shadow, store):
    """Returns the state and the description of a file as format 2 has them.

    Args:
        shadow: The `Shadow` that is loaded.
        store: The dict-like group of the file.

    Returns:
        `(dict from names to arrays, description)`.

    Raises:
        ValueError: If the average of the file does not fit.
    """
    stored = set(store.keys())
    described = {"run": None, "rule": None, "weights": _describe_weights(shadow)}
    if layout.DESCRIPTION in stored:
        described = layout.decode(store[layout.DESCRIPTION])
    described["averages"] = {layout.ONLY: described["rule"]}
    layout.check_names(described, list(shadow.averages))
    numbers = [name for name in stored if name.isdigit()]
    names = _names(shadow, described, len(numbers))
    saved = {name: store[str(number)] for number, name in enumerate(names)}
    saved[layout.origin_name(layout.ONLY)] = 0
    seeds = {name: store[old] for name, old in _seeds(shadow).items() if old in stored}
    return saved | seeds, described


def _names(shadow, described, count):
    counters = [layout.STEP, layout.FINGERPRINT]
    if not layout.has_same_weights(described, _weights(shadow)):
        return counters
    pairs = shadow.first.pairing.pairs if shadow.started else ()
    for compensated in (shadow.compensated, not shadow.compensated):
        names = list(counters)
        for index, p in enumerate(pairs):
            averaged = _is_averaged(shadow, p)
            if averaged and described["weights"][index][2] in ("float16", "bfloat16"):
                names.append(layout.master_name(layout.ONLY, index))
            if averaged and compensated:
                names.append(layout.residual_name(layout.ONLY, index))
        if len(names) == count:
            layout.check_compensated({"compensated": compensated}, shadow.compensated)
            return names
    raise layout.damaged(f"{count} variables of state where {len(names)} are expected")


def _is_averaged(shadow, p):
    # Format 1 neither excluded nor shared weights.
    is_float = keras.backend.is_float_dtype(p.raw.dtype)
    return is_float and (p.learned or shadow.non_trainable == "average")


def _weights(shadow):
    return shadow.first.pairing.raw_model.weights if shadow.started else ()


def _describe_weights(shadow):
    return [[w.path, list(w.shape), str(w.dtype)] for w in _weights(shadow)]


def _seeds(shadow):
    models = {}
    if shadow.started:
        models = {"raw": shadow.first.pairing.raw_model, layout.ONLY: shadow.first.model}
    names = [
        layout.seed_name(owner, index)
        for owner, model in models.items()
        for index, _ in enumerate(keras_internals.seed_states(model))
    ]
    return {name: f"seed_{index}" for index, name in enumerate(names)}
