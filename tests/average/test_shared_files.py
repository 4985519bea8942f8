"""A file contains what averages share once, and is loaded with and without sharing."""

import functools
import json
import os
import zipfile

import h5py
import keras
import numpy as np
import pytest
from frozen_models import (
    SHARED,
    X,
    Y,
    all_values,
    enable_lora,
    fit,
    freeze_kernel,
    keep,
    make_frozen,
    names_of,
    quantize,
    quantize_with_lora,
    values_of,
)
from keras import layers
from models import assert_identical

from polyak_model import (
    AverageCheckpoint,
    AverageSnapshots,
    PolyakModel,
    PowerAverage,
    snapshots,
)
from polyak_model.errors import InputError
from polyak_model.saving.extraction import extract
from polyak_model.weight_files.reader import open_weights

SEVERAL = {"short": 0.5, "long": 0.9}
CHANGES = {change.__name__: change for change in SHARED}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def wrap(change=keep, share_frozen=True, average=SEVERAL, **options):
    model = PolyakModel(make_frozen(change), average, share_frozen=share_frozen, **options)
    model.optimizer.build(model.raw_model.trainable_variables)
    return model


def trained(change=keep, share_frozen=True, **options):
    model = wrap(change, share_frozen, **options)
    fit(model)
    return model


@functools.cache
def trained_once(change):
    """Returns a wrapper for tests that only read it; training takes longer than most of them."""
    return trained(change)


def predictions(model):
    return [model.predict(X, using=route, verbose=0) for route in (*model.rules, "raw")]


def shared_names(model):
    return names_of(p.raw for p in model.shadow.first.pairing.shared)


def extract_file(source, contents, output):
    with open_weights(source) as weights:
        extract(weights, contents, output)


def list_variables(path):
    """Returns the dtypes and values of the weights in a file, and the names of its groups."""
    with open_weights(path) as weights:
        variables = {
            name: (variable.dtype, np.array(variable.read()))
            for name, variable in weights.variables.items()
            if not name.startswith("optimizer/")
        }
        return variables, set(weights.attributes) - {"optimizer", "optimizer/vars"}


def count_stored(path, shape):
    with open_weights(path) as weights:
        return sum(v.shape == shape for n, v in weights.variables.items() if "optim" not in n)


@pytest.mark.parametrize("change", [keep, enable_lora])
@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5"])
def test_a_file_contains_what_is_shared_once(change, name, tmp_path):
    model = trained_once(change)
    (model.save if name == "a.keras" else model.save_weights)(tmp_path / name)
    assert count_stored(tmp_path / name, (6, 8)) == 1
    assert count_stored(tmp_path / name, (8, 5)) == (1 if change is enable_lora else 3)
    assert count_stored(tmp_path / name, (5, 3)) == 3
    # What was changed to write the file is as before.
    layer = model.raw_model.get_layer("middle")
    assert "save_own_variables" not in vars(layer)
    assert layer.lora_enabled == (change is enable_lora)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (keep, "a.keras"),
        (enable_lora, "a.keras"),
        (quantize_with_lora, "a.keras"),
        (enable_lora, "a.weights.h5"),
        # A config of Keras does not say that a single weight is frozen.
        (freeze_kernel, "a.weights.h5"),
        (quantize, "a.weights.h5"),
    ],
)
def test_save_load_continue_is_never_stopping(change, name, tmp_path):
    model = trained(change, compensated=True)
    if name == "a.keras":
        model.save(tmp_path / name)
        loaded = keras.models.load_model(tmp_path / name)
    else:
        model.save_weights(tmp_path / name)
        loaded = wrap(change, compensated=True)
        loaded.load_weights(tmp_path / name)
    assert shared_names(loaded) == SHARED[change]
    assert_identical(all_values(loaded), all_values(model))
    for each in (model, loaded):
        fit(each)
    assert_identical(all_values(loaded), all_values(model))
    assert_identical(predictions(loaded), predictions(model))


@pytest.mark.tensorflow
@pytest.mark.parametrize("change", [freeze_kernel, enable_lora, quantize_with_lora])
def test_a_file_is_loaded_by_a_wrapper_that_does_not_share(change, tmp_path):
    model, other = trained(change), wrap(change, share_frozen=False)
    model.save_weights(tmp_path / "a.weights.h5")
    other.load_weights(tmp_path / "a.weights.h5")
    assert_identical(all_values(other), all_values(model))
    fit(other)
    fit(model)
    assert_identical(all_values(other), all_values(model))


@pytest.mark.tensorflow
def test_a_file_is_loaded_by_a_wrapper_that_does_share_if_values_agree(tmp_path):
    model, other = trained(share_frozen=False), wrap()
    model.save_weights(tmp_path / "a.weights.h5")
    other.load_weights(tmp_path / "a.weights.h5")
    assert_identical(all_values(other), all_values(model))
    assert shared_names(other) == SHARED[keep]


@pytest.mark.tensorflow
def test_a_file_with_other_values_is_refused_by_name(tmp_path):
    model = trained(enable_lora, share_frozen=False)
    model.save_weights(tmp_path / "a.weights.h5")
    other = wrap(enable_lora)
    before = all_values(other)
    message = "average of the weight '.*middle/kernel' that differs.*share_frozen=False"
    with pytest.raises(ValueError, match=message):
        other.load_weights(tmp_path / "a.weights.h5")
    assert_identical(all_values(other), before)
    assert "load_own_variables" not in vars(other.raw_model.get_layer("middle"))


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(("change", "other"), [(enable_lora, keep), (quantize_with_lora, quantize)])
def test_factors_of_lora_are_merged_where_a_model_has_none(change, other, tmp_path):
    model = trained_once(change)
    model.save_weights(tmp_path / "a.weights.h5")
    loaded = wrap(other, share_frozen=False)
    loaded.load_weights(tmp_path / "a.weights.h5")
    # What Keras itself makes of each model.
    for one, received in zip(
        (model.raw_model, *model.average_models.values()),
        (loaded.raw_model, *loaded.average_models.values()),
        strict=True,
    ):
        one.save_weights(tmp_path / "one.weights.h5")
        bare = make_frozen(other)
        bare.load_weights(tmp_path / "one.weights.h5")
        assert_identical(values_of(received.weights), values_of(bare.weights))


@pytest.mark.tensorflow
def test_averages_can_be_added_to_and_left_out_of_a_file(tmp_path):
    model = trained_once(enable_lora)
    model.save_weights(tmp_path / "a.weights.h5")
    other = wrap(enable_lora, average={"long": 0.9, "new": 0.5})
    other.load_weights(tmp_path / "a.weights.h5")
    expected = values_of(model.average_models["long"].weights)
    assert_identical(values_of(other.average_models["long"].weights), expected)
    expected = values_of(model.raw_model.weights)
    assert_identical(values_of(other.average_models["new"].weights), expected)


@pytest.mark.tensorflow
def test_a_larger_model_saves_and_loads_a_part_that_shares(tmp_path):
    def make():
        inner = make_frozen(enable_lora, compiled=False)
        part = PolyakModel(inner, SEVERAL, share_frozen=True)
        inputs = keras.Input((6,))
        larger = keras.Model(inputs, part(inputs))
        larger.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
        return larger, part

    larger, part = make()
    fit(larger)
    larger.save(tmp_path / "a.keras")
    assert count_stored(tmp_path / "a.keras", (6, 8)) == 1
    assert "save_own_variables" not in vars(part.raw_model.get_layer("middle"))
    loaded = keras.models.load_model(tmp_path / "a.keras")
    assert_identical(values_of(loaded.weights), values_of(larger.weights))
    other, again = make()
    larger.save_weights(tmp_path / "a.weights.h5")
    other.load_weights(tmp_path / "a.weights.h5")
    assert_identical(all_values(again), all_values(part))


@changes
def test_an_average_is_saved_as_a_complete_plain_model(change, tmp_path):
    model = trained_once(change)
    model.save(tmp_path / "all.keras")  # What is left out there is not left out afterwards.
    model.average_models["long"].save(tmp_path / "long.keras")
    with zipfile.ZipFile(tmp_path / "long.keras") as archive:
        assert "polyak" not in json.dumps(json.loads(archive.read("config.json")))
    loaded = keras.models.load_model(tmp_path / "long.keras")
    received, expected = loaded.predict(X, verbose=0), model.predict(X, using="long", verbose=0)
    # Keras rounds a quantized kernel again when it merges LoRA into it.
    tolerance = 1e-2 if change is quantize_with_lora else 1e-6
    np.testing.assert_allclose(received, expected, rtol=0, atol=tolerance)


@pytest.mark.tensorflow
def test_a_save_that_fails_leaves_the_model_as_it_was(tmp_path):
    model = trained(enable_lora)

    def fail(store):
        raise OSError("The disk is full.")

    head = model.average_models["long"].get_layer("head")
    head.save_own_variables = fail
    with pytest.raises(OSError, match="The disk is full"):
        model.save(tmp_path / "a.keras")
    del head.save_own_variables
    for each in (model.raw_model, *model.average_models.values()):
        assert "save_own_variables" not in vars(each.get_layer("middle"))
        assert each.get_layer("middle").lora_enabled
    model.save(tmp_path / "a.keras")


@pytest.mark.tensorflow
@pytest.mark.parametrize("change", [keep, enable_lora, quantize])
@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5"])
def test_what_is_extracted_is_what_the_model_itself_saves(change, name, tmp_path):
    model = trained_once(change)
    (model.save if name == "a.keras" else model.save_weights)(tmp_path / name)
    for contents, saved in {**model.average_models, "raw": model.raw_model}.items():
        extracted = tmp_path / f"{contents}-{name}"
        extract_file(tmp_path / name, contents, extracted)
        saved.save_weights(tmp_path / "expected.weights.h5")
        variables, groups = list_variables(extracted)
        expected, expected_groups = list_variables(tmp_path / "expected.weights.h5")
        assert groups == expected_groups
        assert variables.keys() == expected.keys()
        for path, (dtype, value) in expected.items():
            assert variables[path][0] == dtype
            np.testing.assert_allclose(variables[path][1], value, rtol=1e-6, atol=1e-7)
        if name == "a.keras":
            received = keras.models.load_model(extracted).predict(X, verbose=0)
            predicted = model.predict(X, using=contents, verbose=0)
            np.testing.assert_allclose(received, predicted, rtol=0, atol=1e-6)


@pytest.mark.tensorflow
def test_a_quantized_kernel_with_lora_is_not_extracted(tmp_path):
    trained_once(quantize_with_lora).save(tmp_path / "a.keras")
    with pytest.raises(InputError, match="under LoRA is quantized. Load the file with Keras"):
        extract_file(tmp_path / "a.keras", "long", tmp_path / "b.keras")
    assert not os.path.exists(tmp_path / "b.keras")


@pytest.mark.tensorflow
@pytest.mark.parametrize("removed", ["lora_kernel_a", "lora_kernel_b", "0"])
def test_a_file_that_lacks_a_part_of_lora_is_refused(removed, tmp_path):
    path = tmp_path / "a.weights.h5"
    trained_once(enable_lora).save_weights(path)
    with h5py.File(path, "r+") as file:
        del file["raw_model/layers/dense/vars"][removed]
    with pytest.raises(InputError, match="'layers/dense/vars' lacks a part of its LoRA"):
        extract_file(path, "raw", tmp_path / "b.weights.h5")


@pytest.mark.tensorflow
def test_snapshots_of_a_model_that_shares_are_rebuilt(tmp_path):
    model = trained(average=PowerAverage.pair())
    fit(model, epochs=4, callbacks=[AverageSnapshots(tmp_path / "s", every=2)])
    name, rule = next(iter(model.rules.items()))
    model.average_models[name].save(tmp_path / "plain.keras")
    snapshots.rebuild(tmp_path / "s", rule, tmp_path / "r.keras", like=tmp_path / "plain.keras")
    rebuilt = keras.models.load_model(tmp_path / "r.keras", compile=False)
    for one, other in zip(
        values_of(rebuilt.weights), values_of(model.average_models[name].weights), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.tensorflow
def test_checkpoints_of_a_model_that_shares(tmp_path):
    model = wrap(enable_lora)
    callbacks = [
        AverageCheckpoint(tmp_path / f"{contents}.keras", contents=contents)
        for contents in ("long", "raw", "both")
    ]
    fit(model, validation_data=(X, Y), callbacks=callbacks)
    expected = dict(zip((*model.rules, "raw"), predictions(model), strict=True))
    for contents in ("long", "raw"):
        plain = keras.models.load_model(tmp_path / f"{contents}.keras")
        received = plain.predict(X, verbose=0)
        np.testing.assert_allclose(received, expected[contents], rtol=0, atol=1e-6)
    both = keras.models.load_model(tmp_path / "both.keras")
    assert_identical(all_values(both), all_values(model))


@pytest.mark.tensorflow
def test_a_large_frozen_part_takes_its_place_in_files_once(tmp_path):
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(2**15), layers.Dense(1)])
    inner.layers[0].trainable = False
    model = PolyakModel(inner, SEVERAL, share_frozen=True)
    frozen = sum(v.nbytes for v in values_of(inner.layers[0].weights))
    trained_bytes = sum(v.nbytes for v in values_of(inner.layers[1].weights))
    for save, name in ((model.save, "a.keras"), (model.save_weights, "a.weights.h5")):
        save(tmp_path / name)
        assert os.path.getsize(tmp_path / name) < frozen + 3 * trained_bytes + 2**17
