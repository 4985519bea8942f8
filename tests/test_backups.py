"""Training that is killed goes on from its backup as if it had never stopped."""

import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from models import make_compiled

from polyak_model import PolyakModel
from polyak_model.saving.score_record import read_record

WORKER = pathlib.Path(__file__).with_name("kill_worker.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL and no fork")
def test_training_killed_ten_times_ends_as_training_never_stopped(tmp_path):
    subprocess.run([sys.executable, WORKER, tmp_path, "10", "0"], check=True, capture_output=True)
    expected = np.load(tmp_path / "whole" / "state.npz")
    assert float(expected["best"]) == expected["scored"]
    for folder in tmp_path.glob("[0-9]*"):
        received = np.load(folder / "state.npz")
        assert sorted(received.files) == sorted(expected.files)
        for name in expected.files:
            np.testing.assert_array_equal(received[name], expected[name], err_msg=name)
        checkpoints = ["29.weights.h5", "30.weights.h5", "best.keras"]
        assert sorted(path.name for path in folder.glob("[!.]*.*")) == [*checkpoints, "state.npz"]


def fit(model, batches, folder, epochs=3, **kwargs):
    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    model.fit(*batches, batch_size=32, epochs=epochs, verbose=0, callbacks=[backup], **kwargs)


@pytest.fixture
def backup(batches, tmp_path):
    """The folder of a backup after three epochs of two steps."""
    fit(PolyakModel(make_compiled("sgd")), batches, tmp_path)
    return tmp_path


def test_a_backup_records_the_epoch_that_comes_next(backup):
    assert read_record(backup / "latest.weights.h5") == {"epoch": 3, "batch": 0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text(json.dumps({"epoch": 2, "batch": 0})),
    ],
    ids=["missing", "empty", "of the epoch before"],
)
def test_no_epoch_is_repeated_when_the_epoch_was_not_written_after_the_weights(
    damage, backup, batches
):
    damage(backup / "training_metadata.json")
    model = PolyakModel(make_compiled("sgd"))
    fit(model, batches, backup, epochs=4)
    assert model.average_step == 8


def test_no_epoch_is_left_out_when_the_weights_are_gone(backup, batches):
    (backup / "latest.weights.h5").unlink()
    model = PolyakModel(make_compiled("sgd"))
    fit(model, batches, backup, epochs=3)
    assert model.average_step == 6


def test_a_damaged_backup_is_replaced_by_the_one_before(batches, tmp_path):
    kwargs = {"double_checkpoint": True, "delete_checkpoint": False}
    first = keras.callbacks.BackupAndRestore(tmp_path, **kwargs)
    model = PolyakModel(make_compiled("sgd"))
    model.fit(*batches, batch_size=32, epochs=3, verbose=0, callbacks=[first])
    (tmp_path / "latest.weights.h5").write_bytes(b"damaged")
    model = PolyakModel(make_compiled("sgd"))
    second = keras.callbacks.BackupAndRestore(tmp_path, **kwargs)
    model.fit(*batches, batch_size=32, epochs=3, verbose=0, callbacks=[second])
    assert model.average_step == 6
