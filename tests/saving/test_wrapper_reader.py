import json
import pathlib
import shutil

import h5py
import keras
import numpy as np
import pytest
from wrappers import DESCRIPTION, KINDS, RULE, describe, make_wrapper, save_all

from polyak_model.errors import InputError
from polyak_model.saving.wrapper_reader import Wrapper, find_wrappers, read_rules, read_step
from polyak_model.weight_files.reader import open_weights

FORMATS = pathlib.Path(__file__).parents[1] / "formats"


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


def groups(path):
    """The groups of a PolyakModel at a path in a file."""
    averages = {"average": f"{path}averages/average"}
    return Wrapper(
        path.rstrip("/"),
        averages,
        f"{path}raw_model",
        f"{path}shadow",
        f"{path}vars/description",
    )


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_is_found_in_its_file_whatever_its_class_is_called(saved, kind, ending):
    with open_weights(saved / f"{kind}{ending}") as weights:
        assert find_wrappers(weights) == [groups("")]


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_a_wrapper_is_found_in_a_file_of_format_1(ending):
    with open_weights(FORMATS / f"format-1{ending}") as weights:
        (wrapper,) = find_wrappers(weights)
        assert wrapper.averages == {"average": "average_model"}
        assert (wrapper.raw, wrapper.state) == ("layers/sequential", "layers/shadow")
        assert read_rules(weights, wrapper)["average"]["class_name"] == "PowerAverage"
        assert read_step(weights, wrapper) == np.load(FORMATS / "format-1.npz")["step"]


@pytest.mark.parametrize("described", [False, True])
def test_a_raw_model_of_a_class_named_shadow_is_not_taken_for_the_state_of_format_1(
    tmp_path, described
):
    with h5py.File(tmp_path / "shadow.weights.h5", "w") as file:
        for name in ("average_model/dense", "layers/shadow/dense", "layers/shadow_1"):
            file[f"{name}/vars/0"] = 1
        if described:
            file["layers/shadow_1/vars/description"] = np.frombuffer(b"{}", "uint8")
    wrapper = inspect(tmp_path / "shadow.weights.h5", lambda weights, wrapper: wrapper)
    assert (wrapper.raw, wrapper.state) == ("layers/shadow", "layers/shadow_1")


def test_a_wrapper_is_found_as_a_part_of_a_larger_model(tmp_path):
    model = keras.Sequential([keras.Input((6,)), make_wrapper("functional")])
    model.save_weights(tmp_path / "larger.weights.h5")
    wrapper = inspect(tmp_path / "larger.weights.h5", lambda weights, wrapper: wrapper)
    assert wrapper == groups("layers/polyak_model/")


def test_the_rules_of_several_averages_are_read_in_the_order_of_the_model(tmp_path):
    model = make_wrapper("sequential", average={"long": 0.99, "short": 0.9})
    model.save_weights(tmp_path / "several.weights.h5")
    rules = inspect(tmp_path / "several.weights.h5", read_rules)
    assert [(name, rule["config"]["decay"]) for name, rule in rules.items()] == [
        ("long", 0.99),
        ("short", 0.9),
    ]


def test_no_wrapper_is_found_in_the_file_of_a_plain_model(tmp_path):
    KINDS["sequential"]().save_weights(tmp_path / "plain.weights.h5")
    with open_weights(tmp_path / "plain.weights.h5") as weights:
        assert find_wrappers(weights) == []


@pytest.mark.parametrize("name", ["sequential.keras", "sequential.weights.h5", "shadow.keras"])
def test_the_step_is_read(saved, name):
    assert inspect(saved / name, read_step) == 3


def test_the_rule_is_read_from_the_description(weights_file):
    assert inspect(weights_file, read_rules)["average"]["config"]["decay"] == 0.5


def test_a_file_without_a_description_has_no_rule(weights_file):
    describe(weights_file, text=None)
    assert inspect(weights_file, read_rules) == {"average": None}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        {},
        DESCRIPTION | {"averages": {"average": "uniform"}},
        DESCRIPTION | {"averages": {"average": {"class_name": 1, "config": {}}}},
        DESCRIPTION | {"averages": {"average": {"class_name": "UniformAverage"}}},
        DESCRIPTION | {"averages": {"average": RULE, "other": RULE}},
        DESCRIPTION | {"averages": {"of/": RULE}},
    ],
    ids=lambda text: json.dumps(text)[-40:] if isinstance(text, dict) else repr(text[:5]),
)
def test_a_description_without_a_rule_is_refused(weights_file, text):
    describe(weights_file, text=text)
    with pytest.raises(InputError, match="sequential.weights.h5") as caught:
        inspect(weights_file, read_rules)
    assert "\n" not in str(caught.value)


def test_a_description_of_another_dtype_is_refused(weights_file):
    describe(weights_file, text=None)
    with h5py.File(weights_file, "r+") as file:
        file["vars/description"] = np.zeros(3)
    with pytest.raises(InputError, match="is not the description of a rule"):
        inspect(weights_file, read_rules)


def test_a_state_without_a_step_is_refused(weights_file):
    with h5py.File(weights_file, "r+") as file:
        del file["shadow/vars/step"]
    with pytest.raises(InputError, match="'shadow' does not contain the step"):
        inspect(weights_file, read_step)
