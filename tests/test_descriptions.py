import json

import keras
import numpy as np
import pytest

from polyak_model import UniformAverage, __version__
from polyak_model.saving import description as descriptions


def make_weights(*units):
    return keras.Sequential([keras.Input((3,)), *map(keras.layers.Dense, units)]).weights


def test_a_description_says_format_version_run_rule_and_weights():
    described = descriptions.describe(UniformAverage(start_step=5), "a run", make_weights(2))
    decoded = descriptions.decode(descriptions.encode(described))
    assert decoded == described
    assert (decoded["format"], decoded["version"], decoded["run"]) == (1, __version__, "a run")
    assert decoded["rule"]["class_name"] == "UniformAverage"
    assert decoded["rule"]["config"]["start_step"] == 5
    assert [entry[1:] for entry in decoded["weights"]] == [[[3, 2], "float32"], [[2], "float32"]]


def test_no_two_trainings_have_the_same_run_whatever_the_seed():
    runs = set()
    for _ in range(3):
        keras.utils.set_random_seed(0)
        runs.add(descriptions.new_run())
    assert len(runs) == 3


def test_a_newer_format_is_refused_with_the_version_that_wrote_it():
    newer = descriptions.encode({"format": 2, "version": "9.1"})
    with pytest.raises(ValueError, match="format 2, written by a polyak_model 9.1; .* at most 1"):
        descriptions.decode(newer)


@pytest.mark.parametrize("text", ["", "{", "3", "[1]", "{}", '{"format": "x", "version": "1"}'])
def test_what_is_no_description_is_refused(text):
    with pytest.raises(ValueError, match="The file's description of itself cannot be read"):
        descriptions.decode(np.frombuffer(text.encode(), "uint8"))


def test_another_architecture_is_refused_by_the_first_weight_that_differs():
    described = json.loads(json.dumps(descriptions.describe(UniformAverage(), "", make_weights(2))))
    descriptions.check_weights(described, make_weights(2))
    with pytest.raises(ValueError, match=r"dense/kernel' has shape \(3, 2\), .* \(3, 4\)"):
        descriptions.check_weights(described, make_weights(4))
    with pytest.raises(ValueError, match="2 weights with 8 parameters, .* has 4 with 11"):
        descriptions.check_weights(described, make_weights(2, 1))
