import zipfile

import h5py
import keras
import pytest

from polyak_model.saving.score_record import read_record, write_record

RECORD = {"score": 0.1 + 0.2, "epoch": 3}


@pytest.fixture(params=["model.keras", "model.weights.h5"])
def file(request, tmp_path):
    """A file of a small model that Keras saved."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    path = tmp_path / request.param
    (model.save if path.suffix == ".keras" else model.save_weights)(path)
    return path


def test_a_record_is_read_as_it_was_written_to_the_last_bit(file):
    assert read_record(file) == {}
    write_record(file, RECORD)
    assert read_record(file) == RECORD


def test_keras_loads_a_file_with_a_record(file):
    write_record(file, RECORD)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.load_weights(file)
    if file.suffix == ".keras":
        assert keras.models.load_model(file).count_params() == 3


def test_what_is_no_record_is_none(tmp_path):
    missing, archive, weights = (tmp_path / n for n in ("0.keras", "1.keras", "2.weights.h5"))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("polyak_model.json", "[1")
    with h5py.File(weights, "w") as file:
        file.attrs["polyak_model"] = "[1]"
    (tmp_path / "3.keras").write_bytes(b"no archive")
    for path in (missing, archive, weights, tmp_path / "3.keras"):
        assert read_record(path) == {}
