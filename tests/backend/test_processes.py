"""`fit` over two processes of JAX, which share the weights of one model."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
from frameworks import BACKEND

from polyak_model import PolyakModel

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(BACKEND != "jax", reason="Keras fits over several processes on JAX"),
]
WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "process_worker.py"


def run_both(folder, stage):
    """Runs a stage of `process_worker` in two processes, and returns what each of them found."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    settings = {
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), address, folder, stage],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def trained(folder):
    """What both found where weights are spread over the processes; then they were killed."""
    return run_both(folder, "train")


@pytest.fixture(scope="module")
def restarted(folder, trained):
    """What both found after they went on; and where each holds all weights."""
    return run_both(folder, "restart")


@pytest.mark.parametrize("stage", ["trained", "restarted"])
def test_training_is_bit_for_bit_that_of_the_bare_model(stage, request):
    for found in request.getfixturevalue(stage):
        assert found["trains as bare"]
        assert found["logs as bare"]


@pytest.mark.parametrize("stage", ["trained", "restarted"])
def test_the_average_equals_the_closed_form_sum_of_the_iterates(stage, request):
    for found in request.getfixturevalue(stage):
        assert found["error of the average"] < 2e-7


def test_averages_are_spread_over_processes_as_the_raw_weights_are(trained):
    assert [found["sharding"] for found in trained] == ["P(None, 'model')"] * 2


def test_all_variables_are_equal_in_both_processes_bit_for_bit(trained, folder):
    with (
        np.load(folder / "averages-0.npz") as one,
        np.load(folder / "averages-1.npz") as other,
    ):
        assert len(one) == len(other) > 20
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_both_processes_have_the_same_logs_and_routes_report_what_they_score_alone(trained):
    one, other = trained
    assert one["history"] == other["history"]
    assert one["routes"] == other["routes"]
    for found in trained:
        for route, loss in found["alone"].items():
            name = "loss" if route == "average" else f"{route}_loss"
            assert found["routes"][name] == pytest.approx(loss, rel=1e-6)


def test_the_run_is_that_of_the_first_process(trained):
    assert [found["run is its own"] for found in trained] == [True, False]
    assert trained[0]["run"] == trained[1]["run"]


def test_one_process_writes_and_leaves_nothing_else(trained, restarted, folder):
    names = ["4.weights.h5", "best.keras", "snapshots"]
    snapshots = [f"snapshot-00000000{step:02}.weights.h5" for step in (8, 16)]
    for training in ("whole", "killed"):
        assert sorted(os.listdir(folder / training)) == names
        assert sorted(os.listdir(folder / training / "snapshots")) == snapshots
    assert sorted(path.name for path in folder.glob("*.keras")) == ["model.keras"]


def test_a_saved_model_loads_in_both_processes(trained):
    assert all(found["loads"] for found in trained)


def test_a_file_of_several_processes_loads_in_one(trained, folder):
    model = keras.models.load_model(folder / "model.keras")
    assert isinstance(model, PolyakModel)
    with np.load(folder / "averages-0.npz") as expected:
        for value, variable in zip(expected.values(), model.variables, strict=True):
            np.testing.assert_array_equal(value, variable.numpy())


def test_a_training_that_was_killed_goes_on_bit_for_bit(restarted):
    assert all(found["continues"] for found in restarted)


def test_what_fails_in_the_process_that_writes_is_raised_in_both(trained):
    first, second = (found["refusal of a folder"] for found in trained)
    kind, _, reason = first.partition(": ")
    assert kind == "FileNotFoundError"
    assert "Cannot write" in reason
    assert second == f"{kind}: In the process that writes for all: {reason}"


def test_saving_in_one_process_alone_is_refused(restarted):
    said = restarted[0]["refusal to save alone"]
    assert "All of the 2 processes that train a model must save it together" in said
    assert "a call in process 0 for which the others did not come" in said
