import json
import shutil

import h5py
import keras
import numpy as np
import pytest
from wrappers import KINDS, RULE, describe, make_wrapper, save_all

from polyak_model.errors import InputError
from polyak_model.saving.wrapper_reader import Wrapper, find_wrappers, read_rule, read_step
from polyak_model.weight_files.reader import open_weights

GROUPS = {"sequential": "sequential", "functional": "functional", "nested": "functional"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the files of a wrapper of each kind."""
    folder = tmp_path_factory.mktemp("wrappers")
    save_all(folder)
    return folder


@pytest.fixture
def weights_file(saved, tmp_path):
    """A copy of a file of weights, to change."""
    return shutil.copy(saved / "sequential.weights.h5", tmp_path)


def inspect(path, function):
    with open_weights(path) as weights:
        (wrapper,) = find_wrappers(weights)
        return function(weights, wrapper)


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
@pytest.mark.parametrize("kind", GROUPS)
def test_a_wrapper_is_found_in_its_file(saved, kind, ending):
    with open_weights(saved / f"{kind}{ending}") as weights:
        expected = Wrapper("", "average_model", f"layers/{GROUPS[kind]}", "layers/shadow")
        assert find_wrappers(weights) == [expected]


@pytest.mark.parametrize("description", [None, {"rule": RULE}])
def test_a_raw_model_of_a_class_named_shadow_is_not_taken_for_the_state(
    saved, tmp_path, description
):
    path = shutil.copy(saved / "shadow.weights.h5", tmp_path)
    describe(path, "layers/shadow_1", description)
    wrapper = inspect(path, lambda weights, wrapper: wrapper)
    assert (wrapper.raw, wrapper.state) == ("layers/shadow", "layers/shadow_1")


def test_a_wrapper_is_found_as_a_part_of_a_larger_model(tmp_path):
    model = keras.Sequential([keras.Input((6,)), make_wrapper("functional")])
    model.save_weights(tmp_path / "larger.weights.h5")
    wrapper = inspect(tmp_path / "larger.weights.h5", lambda weights, wrapper: wrapper)
    path = "layers/polyak_model"
    raw, state = f"{path}/layers/functional", f"{path}/layers/shadow"
    assert wrapper == Wrapper(path, f"{path}/average_model", raw, state)


def test_no_wrapper_is_found_in_the_file_of_a_plain_model(tmp_path):
    KINDS["sequential"]().save_weights(tmp_path / "plain.weights.h5")
    with open_weights(tmp_path / "plain.weights.h5") as weights:
        assert find_wrappers(weights) == []


@pytest.mark.parametrize("name", ["sequential.keras", "sequential.weights.h5", "shadow.keras"])
def test_the_step_is_read(saved, name):
    assert inspect(saved / name, read_step) == 3


def test_the_rule_is_read_from_the_config(saved):
    rule = inspect(saved / "sequential.keras", read_rule)
    assert rule["class_name"] == "ExponentialAverage"
    assert rule["config"]["decay"] == 0.5


def test_the_rule_is_read_from_the_description(weights_file):
    describe(weights_file, text={"format": 1, "rule": RULE, "weights": []})
    assert inspect(weights_file, read_rule) == RULE


def test_a_file_without_a_description_has_no_rule(weights_file):
    describe(weights_file, text=None)
    assert inspect(weights_file, read_rule) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        {},
        {"rule": "uniform"},
        {"rule": {"class_name": 1, "config": {}}},
        {"rule": {"class_name": "UniformAverage"}},
    ],
    ids=lambda text: json.dumps(text)[:20] if isinstance(text, dict) else repr(text[:5]),
)
def test_a_description_without_a_rule_is_refused(weights_file, text):
    describe(weights_file, text=text)
    with pytest.raises(InputError, match="sequential.weights.h5") as caught:
        inspect(weights_file, read_rule)
    assert "\n" not in str(caught.value)


def test_a_description_of_another_dtype_is_refused(weights_file):
    describe(weights_file, text=None)
    with h5py.File(weights_file, "r+") as file:
        file["layers/shadow/vars/description"] = np.zeros(3)
    with pytest.raises(InputError, match="is not the description of a rule"):
        inspect(weights_file, read_rule)


def test_a_state_without_a_step_is_refused(weights_file):
    with h5py.File(weights_file, "r+") as file:
        del file["layers/shadow/vars/0"]
    with pytest.raises(InputError, match="'layers/shadow' does not contain the step"):
        inspect(weights_file, read_step)
