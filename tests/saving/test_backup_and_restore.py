"""Training that is killed resumes from its backup as if it had never been interrupted."""

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

WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "kill_worker.py"


@pytest.mark.tensorflow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL and no fork")
def test_training_killed_several_times_ends_like_uninterrupted_training(tmp_path):
    subprocess.run([sys.executable, WORKER, tmp_path, "5", "0"], check=True, capture_output=True)
    expected = np.load(tmp_path / "whole" / "state.npz")
    # `fit` and `evaluate` compute the score in different programs, which may round differently.
    assert float(expected["best"]) == pytest.approx(float(expected["scored"]), rel=1e-6, abs=0)
    for folder in tmp_path.glob("[0-9]*"):
        received = np.load(folder / "state.npz")
        assert sorted(received.files) == sorted(expected.files)
        for name in expected.files:
            np.testing.assert_array_equal(received[name], expected[name], err_msg=name)
        checkpoints = ["11.weights.h5", "12.weights.h5", "best.keras"]
        assert sorted(path.name for path in folder.glob("[!.]*.*")) == [*checkpoints, "state.npz"]


def fit(model, batches, folder, epochs=3, **kwargs):
    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False, **kwargs)
    model.fit(*batches, batch_size=32, epochs=epochs, verbose=0, callbacks=[backup])


@pytest.fixture
def backup(batches, tmp_path):
    """The folder of a backup after three epochs of two steps."""
    fit(PolyakModel(make_compiled("sgd")), batches, tmp_path)
    return tmp_path


def test_a_backup_records_the_next_epoch(backup):
    assert read_record(backup / "latest.weights.h5") == {"epoch": 3, "batch": 0}


@pytest.mark.parametrize("spelling", ["backup", "backup/", "./backup", "backup//", "a/../backup"])
def test_a_backup_records_the_next_epoch_however_its_folder_is_spelled(
    spelling, batches, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    fit(PolyakModel(make_compiled("sgd")), batches, spelling, epochs=1)
    assert read_record("backup/latest.weights.h5") == {"epoch": 1, "batch": 0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text(json.dumps({"epoch": 2, "batch": 0})),
    ],
    ids=["missing", "empty", "from the epoch before"],
)
def test_no_epoch_is_repeated_when_only_the_weights_were_written(damage, backup, batches):
    damage(backup / "training_metadata.json")
    model = PolyakModel(make_compiled("sgd"))
    fit(model, batches, backup, epochs=4)
    assert model.average_step == 8


def test_no_epoch_is_skipped_when_the_weights_are_gone(backup, batches):
    (backup / "latest.weights.h5").unlink()
    model = PolyakModel(make_compiled("sgd"))
    fit(model, batches, backup, epochs=3)
    assert model.average_step == 6


@pytest.mark.parametrize("epoch", [1, 2], ids=["stale epoch", "right epoch"])
def test_a_damaged_backup_is_replaced_by_the_previous_one(epoch, batches, tmp_path):
    kwargs = {"double_checkpoint": True}
    fit(PolyakModel(make_compiled("sgd")), batches, tmp_path, **kwargs)
    (tmp_path / "latest.weights.h5").write_bytes(b"damaged")
    (tmp_path / "training_metadata.json.bkp").write_text(json.dumps({"epoch": epoch, "batch": 0}))
    model = PolyakModel(make_compiled("sgd"))
    fit(model, batches, tmp_path, **kwargs)
    assert model.average_step == 6
