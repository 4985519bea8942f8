import math

import h5py
import ml_dtypes
import numpy as np
import pytest
from wrappers import KINDS, save_all

from polyak_model.errors import InputError
from polyak_model.saving import distances
from polyak_model.saving.distances import Distance, measure_distances, measure_total
from polyak_model.saving.wrapper_reader import find_wrappers
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.training_state import split_variables


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the files of a wrapper of each kind, and the wrappers."""
    folder = tmp_path_factory.mktemp("wrappers")
    return folder, save_all(folder)


def measure_first(weights):
    """Measures the single average of a file."""
    (wrapper,) = find_wrappers(weights)
    return measure_distances(weights, wrapper.raw, wrapper.averages["average"])


@pytest.fixture
def measure(tmp_path):
    """Measures a file of one layer with a raw and an average array."""

    def measure(raw, average):
        with h5py.File(tmp_path / "pair.weights.h5", "w") as file:
            for group, array in (("raw_model", raw), ("averages/average", average)):
                dataset = file.create_dataset(f"{group}/layers/dense/vars/0", data=array)
                if array.dtype == ml_dtypes.bfloat16:
                    dataset.attrs["dtype"] = "bfloat16"
            file["shadow/vars/step"] = 1
        with open_weights(tmp_path / "pair.weights.h5") as weights:
            return measure_first(weights)

    return measure


@pytest.mark.parametrize("kind", KINDS)
def test_the_raw_and_the_average_model_have_the_same_variables_in_a_file(saved, kind):
    folder, _ = saved
    with open_weights(folder / f"{kind}.keras") as weights:
        (wrapper,) = find_wrappers(weights)
        (raw, _), (average, _) = (
            split_variables(weights, group) for group in (wrapper.raw, wrapper.averages["average"])
        )
        assert {k: v.shape for k, v in raw.items()} == {k: v.shape for k, v in average.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_state_of_optimizers_are_listed_separately(saved, kind):
    folder, wrappers = saved
    raw = wrappers[kind].raw_model
    with open_weights(folder / f"{kind}.weights.h5") as weights:
        (wrapper,) = find_wrappers(weights)
        model, optimizers = split_variables(weights, wrapper.raw)
        assert len(model) == len(raw.weights)
        assert len(optimizers) == len(raw.optimizer.variables)
        whole, others = split_variables(weights)
        assert whole.keys() | others.keys() == weights.variables.keys()


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_is_the_euclidean_norm_of_the_difference(saved, kind, ending):
    folder, wrappers = saved
    model = wrappers[kind]
    with open_weights(folder / f"{kind}{ending}") as weights:
        by_layer = measure_first(weights)
    total = measure_total(by_layer)
    pairs = zip(model.raw_model.weights, model.average_model.weights, strict=True)
    differences = [np.float64(raw.numpy()) - np.float64(average.numpy()) for raw, average in pairs]
    norms = [np.float64(raw.numpy()) for raw in model.raw_model.weights]
    for measured, arrays in ((total.distance, differences), (total.norm, norms)):
        expected = math.sqrt(math.fsum(np.concatenate([a.ravel() for a in arrays]) ** 2))
        np.testing.assert_allclose(measured, expected, rtol=1e-14)
    layers = {layer for layer in model.raw_model._flatten_layers() if layer._trainable_variables}
    assert len(by_layer) == len(layers)


def test_the_distance_of_one_layer_is_that_of_its_arrays(saved):
    folder, wrappers = saved
    with open_weights(folder / "sequential.keras") as weights:
        layers = measure_first(weights)
    raw, average = wrappers["sequential"].raw_model, wrappers["sequential"].average_model
    pairs = zip(raw.get_layer("first").weights, average.get_layer("first").weights, strict=True)
    difference = np.concatenate([(np.float64(r) - np.float64(a)).ravel() for r, a in pairs])
    (first,) = [each for each in layers if each.layer == "layers/dense"]
    np.testing.assert_allclose(first.distance, np.linalg.norm(difference), rtol=1e-14)


def test_the_distance_is_the_same_in_blocks_of_any_size(measure, monkeypatch):
    raw, average = np.random.default_rng(0).normal(size=(2, 7, 5))
    (whole,) = measure(raw, average)
    for size in (1, 3, 12, 35):
        monkeypatch.setattr(distances, "_BLOCK", size)
        (cut,) = measure(raw, average)
        np.testing.assert_allclose(cut[1:], whole[1:], rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_floats_of_every_dtype_are_measured(measure, dtype):
    (distance,) = measure(np.array([3, 4], dtype), np.array([0, 0], dtype))
    assert distance == Distance("layers/dense", 5.0, 5.0)
    assert distance.relative == 1


def test_integers_have_no_distance(measure):
    assert measure(np.array([3, 4]), np.array([0, 0])) == []


def test_the_distance_relative_to_zero_weights_is_zero_or_infinite():
    assert Distance("a", 0.0, 0.0).relative == 0
    assert Distance("a", 1.0, 0.0).relative == math.inf
    assert measure_total([]) == Distance("total", 0.0, 0.0)


def test_models_of_different_shapes_are_refused(measure):
    with pytest.raises(InputError, match=r"shape \(2,\) in the raw model and \(1,\) in the averag"):
        measure(np.zeros(2), np.zeros(1))
