"""The state of averages in a file, beside the weights of their models."""

from keras import ops

from polyak_model import backend
from polyak_model.average.average import forget_residuals
from polyak_model.average.pairing import AVERAGED
from polyak_model.backend import keras_internals
from polyak_model.saving import layout


def save(shadow, store):
    """Writes the state of a `Shadow`.

    Args:
        shadow: The `Shadow`.
        store: The dict-like group of a file.
    """
    store[layout.STEP] = shadow.step
    store[layout.FINGERPRINT] = shadow.fingerprint
    for name, seed in _seeds(shadow):
        store[name] = seed
    for average in shadow.averages.values():
        store[layout.origin_name(average.name)] = average.origin
        for index, p in _averaged(average):
            if p.master is not None:
                store[layout.master_name(average.name, index)] = p.master
            if p.residual is not None:
                store[layout.residual_name(average.name, index)] = p.residual


def load(shadow, store, described):
    """Reads the state of a `Shadow`, once the weights of all models have been loaded.

    An average that the file does not contain begins at the loaded raw weights,
    with a step of its own.

    Args:
        shadow: The `Shadow`.
        store: The dict-like group of a file.
        described: The description of the file, see `layout.describe`.
    """
    names = set(store.keys())
    shadow.run = described["run"] or shadow.run
    shadow.step.assign(store[layout.STEP])
    for average in shadow.averages.values():
        if average.name in described["averages"]:
            average.origin.assign(store[layout.origin_name(average.name)])
            _load_beside(average, store, names, described)
        elif shadow.started:
            backend.assign([(average.origin, shadow.step)])
            average.mirror()
    for name, seed in _seeds(shadow):
        if name in names:
            seed.assign(store[name])
    shadow.fingerprint.assign(store[layout.FINGERPRINT])
    # Of another backend or precision, the fingerprint would be another one.
    shadow.detector.accept()


def _load_beside(average, store, names, described):
    weights = average.pairing.raw_model.weights if average.pairing else ()
    fits = layout.has_same_weights(described, weights)
    for index, p in _averaged(average):
        master = layout.master_name(average.name, index)
        residual = layout.residual_name(average.name, index)
        value = ops.convert_to_tensor(store[master]) if fits and master in names else None
        if value is None:
            is_exact = fits and p.master is None
        else:
            # Keras merges LoRA into the kernels of a file, but not into the state in this group.
            is_exact = _is_rounded(value, p.average, described["weights"][index][2])
        if value is not None and is_exact:
            backend.assign([(p.target, value), (p.average, value)])
        elif p.master is not None and not _is_rounded(p.master, p.average, p.average.dtype):
            p.master.assign(p.average)  # Where loading was skipped, it stays.
        if is_exact and residual in names:
            p.residual.assign(store[residual])
        else:
            forget_residuals([p])


def _is_rounded(master, average, dtype):
    return bool(ops.all(ops.cast(ops.cast(master, dtype), average.dtype) == average))


def _averaged(average):
    pairs = average.pairing.pairs if average.pairing else ()
    return [(index, p) for index, p in enumerate(pairs) if p.how == AVERAGED]


def _seeds(shadow):
    """Returns `(name, seed state)` of all models of a `Shadow`."""
    if not shadow.started:
        return []
    models = {"raw": shadow.first.pairing.raw_model}
    models |= {average.name: average.model for average in shadow.averages.values()}
    return [
        (layout.seed_name(owner, index), seed)
        for owner, model in models.items()
        for index, seed in enumerate(keras_internals.seed_states(model))
    ]
