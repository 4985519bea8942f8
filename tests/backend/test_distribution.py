"""The laws for models that `keras.distribution` spreads over several devices on JAX."""

import json
import subprocess
import sys

import pytest
from frameworks import BACKEND

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes models on JAX"),
]


@pytest.fixture(scope="module", params=["data", "model"])
def found(request, tmp_path_factory):
    """What `distribution_worker` found on four devices, by data or by model parallelism."""
    worker = str(request.path.parents[1] / "helpers" / "distribution_worker.py")
    command = [sys.executable, worker, request.param, str(tmp_path_factory.mktemp("files"))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"kind": request.param, **json.loads(said.splitlines()[-1])}


def test_training_is_bit_for_bit_that_of_the_bare_model(found):
    assert found["trains as bare"]


def test_the_average_equals_the_closed_form_sum_of_the_iterates(found):
    assert found["error of the average"] < 2e-7


def test_averages_and_residuals_are_spread_as_the_raw_weights_are(found):
    assert found["spread as raw"]
    assert (
        found["is sharded"] == {"data": "P(None, None)", "model": "P(None, 'model')"}[found["kind"]]
    )


def test_every_route_evaluates_and_predicts(found):
    assert found["routes agree"]
    assert found["ensemble is the mean"]


def test_a_loaded_wrapper_is_spread_likewise_and_continues_bit_for_bit(found):
    assert found["loads"]
    assert found["loaded is spread as raw"]
    assert found["continues"]


def test_statistics_are_refreshed_in_place(found):
    assert found["refreshes"]
    assert found["refreshed is spread as raw"]


def test_a_model_whose_distribution_was_dropped_is_refused(found):
    assert "keras.distribution.set_distribution" in found["refusal"]


def test_a_wrapper_whose_distribution_was_dropped_trains_and_stays_where_it_is(found):
    assert found["stays spread"]
