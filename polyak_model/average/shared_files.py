"""What averages share with the raw model is in the file of a PolyakModel once.

Keras saves and loads layer by layer. While a file is written or read, layers
with shared weights do so as follows: those of an average leave out what is
shared, which is in the group of the raw model. Keras would merge LoRA into the
kernel, and the results for the raw model and for each average would differ. So
the kernel is saved as it is, and beside it the factors, by their names, and
`lora_alpha`. Snapshots contain LoRA in the same form, since merged kernels of
several averages cannot be combined.
"""

import contextlib

import keras
import numpy as np

from polyak_model import backend
from polyak_model.average import cloning
from polyak_model.backend import keras_internals
from polyak_model.saving import layout
from polyak_model.saving.variable_paths import replaced_method

SAVE, LOAD = "save_own_variables", "load_own_variables"


@contextlib.contextmanager
def saving(pairings):
    """While open, averages save all but what they share.

    Args:
        pairings: The `Pairing` of each average of a model.
    """
    with contextlib.ExitStack() as stack:
        for raw, averages in _layers(pairings):
            shared = _shared_ids(pairings, raw)
            if shared:
                stack.enter_context(replaced_method(raw, SAVE, _saver(raw)))
                for average in averages:
                    stack.enter_context(replaced_method(average, SAVE, _saver(average, shared)))
        yield


@contextlib.contextmanager
def loading(pairings, described):
    """While open, averages load what they share from the raw model, which comes first.

    Args:
        pairings: The `Pairing` of each average of a model.
        described: The description of the file, see `layout.describe`.
    """
    is_shared = bool(described.get("shared"))
    with contextlib.ExitStack() as stack:
        for raw, averages in _layers(pairings):
            shared = _shared_ids(pairings, raw)
            if shared or is_shared:
                stored = {}
                stack.enter_context(replaced_method(raw, LOAD, _loader(raw, stored)))
                for average in averages:
                    load = _loader_of_average(average, raw, stored, shared, is_shared)
                    stack.enter_context(replaced_method(average, LOAD, load))
        yield


@contextlib.contextmanager
def unmerged(model):
    """While open, the layers of a model save LoRA as it is, not merged into the kernel.

    Args:
        model: A built `keras.Model`.
    """
    with contextlib.ExitStack() as stack:
        for layer in keras_internals.flatten_layers(model):
            if keras_internals.lora_factors(layer):
                stack.enter_context(replaced_method(layer, SAVE, _saver(layer)))
        yield


def _layers(pairings):
    """Returns a list of each raw layer that has weights, with the list of its copies."""
    of_average = (
        cloning.pair_layers(pairing.raw_model, pairing.average_model) for pairing in pairings
    )
    together = [
        (pairs[0][0], [copy for _, copy in pairs]) for pairs in zip(*of_average, strict=True)
    ]
    return [each for each in together if keras_internals.own_weights(each[0])]


def _shared_ids(pairings, layer):
    shared = {id(p.raw) for p in pairings[0].shared}
    return shared.intersection(map(id, keras_internals.own_weights(layer)))


def _saver(layer, left_out=()):
    save = layer.save_own_variables

    def save_some(store):
        for name, value in _read(layer, save).items():
            if id(value) not in left_out:
                store[name] = value

    return save_some


def _read(layer, save):
    """Returns what a layer saves, a dict of variables and arrays, with LoRA as it is."""
    values = {}
    with _without_lora(layer):
        save(values)
    factors = keras_internals.lora_factors(layer)
    if factors:
        values |= factors
        # The oldest Keras does not scale the product.
        values[layout.LORA_ALPHA] = np.float32(getattr(layer, "lora_alpha", layer.lora_rank))
    return values


def _values(store):
    # A file of Keras can be asked for its names, but not iterated over.
    names = list(store.keys())
    return {name: store[name] for name in names}


def _loader(raw, stored):
    """Returns `load_own_variables` of a raw layer.

    Args:
        raw: The layer.
        stored: An empty dict for what the file contains, if the layer cannot
            hold it as it is.
    """
    load = raw.load_own_variables

    def load_all(store):
        values = _values(store)
        if layout.LORA_ALPHA in values and not keras_internals.lora_factors(raw):
            stored.update(values)
        _load(raw, load, values)

    return load_all


def _loader_of_average(average, raw, stored, shared, is_shared):
    """Returns `load_own_variables` of a layer of an average.

    Args:
        average: The layer.
        raw: That of the raw model.
        stored: See `_loader`.
        shared: The ids of the weights that they share.
        is_shared: Bool. Whether the file lacks what averages shared.
    """
    load, save_raw = average.load_own_variables, raw.save_own_variables

    def load_all(store):
        values = _values(store)
        for name, value in (stored or _read(raw, save_raw)).items():
            if name not in values and is_shared:
                # No other variable may get the array of the raw one.
                is_own = id(value) in shared or not isinstance(value, keras.Variable)
                values[name] = value if is_own else keras.ops.convert_to_numpy(value)
            elif name in values and id(value) in shared:
                _check_equal(values[name], value)
        _load(average, load, values)

    return load_all


def _check_equal(saved, weight):
    expected = keras.ops.convert_to_numpy(weight)
    if not np.array_equal(np.asarray(saved).astype(expected.dtype), expected, equal_nan=True):
        raise ValueError(
            f"The file contains an average of the weight '{weight.path}' that differs from the raw "
            "weight, which this model shares with its averages. Received: a file that was written "
            "with share_frozen=False. Wrap the model with share_frozen=False."
        )


def _load(layer, load, values):
    factors = keras_internals.lora_factors(layer)
    if layout.LORA_ALPHA not in values:
        load(values)
    elif factors:
        with _without_lora(layer):
            load({name: value for name, value in values.items() if name != layout.LORA_ALPHA})
        for name, factor in factors.items():
            factor.assign(values[name])
        if hasattr(layer, "lora_alpha"):
            layer.lora_alpha = _alpha(values)  # Keras does not load it from the config.
    else:
        load(_merge(layer, values))


def _merge(layer, values):
    """Returns what Keras saves of a layer that has the LoRA of some values."""
    alpha = _alpha(values)
    rank = next(value.shape[-1] for name, value in values.items() if name.endswith("_a"))
    with backend.unchanged_generators():
        copy = type(layer).from_config(layer.get_config())
        copy.build_from_config(layer.get_build_config())
        copy.enable_lora(rank, **({} if alpha == rank else {"lora_alpha": alpha}))
    _load(copy, copy.load_own_variables, values)
    merged = {}
    copy.save_own_variables(merged)
    return merged


def _alpha(values):
    return float(np.asarray(values[layout.LORA_ALPHA]))


@contextlib.contextmanager
def _without_lora(layer):
    """While open, a layer saves and loads its kernel as if it had no LoRA."""
    enabled = getattr(layer, "lora_enabled", False)
    if enabled:
        layer.lora_enabled = False
    try:
        yield
    finally:
        if enabled:
            layer.lora_enabled = True
