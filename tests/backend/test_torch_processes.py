"""`DistributedDataParallel` over two processes, in a training loop of one's own."""

import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("for PyTorch", allow_module_level=True)

WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "parallel_worker.py"


@pytest.mark.processes
def test_averages_of_two_processes_are_equal_bit_for_bit_and_one_writes(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), address, tmp_path], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    averages = [[np.load(tmp_path / f"{i}-of-{rank}.npy") for i in range(4)] for rank in range(2)]
    for one, other in zip(*averages, strict=True):
        np.testing.assert_array_equal(one, other)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.average_step == 5
    for expected, received in zip(averages[0], loaded.average_model.get_weights(), strict=True):
        np.testing.assert_array_equal(expected, received)
