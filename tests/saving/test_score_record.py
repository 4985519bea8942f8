import os
import random
import zipfile

import h5py
import keras
import numpy as np
import pytest
from weight_samples import WRITERS

from polyak_model.saving.score_record import read_record, write_record

RECORD = {"score": 0.1 + 0.2, "epoch": 3}


@pytest.fixture(params=["model.keras", "model.weights.h5"])
def file(request, tmp_path):
    """A file of a small model that Keras saved."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    path = tmp_path / request.param
    (model.save if path.suffix == ".keras" else model.save_weights)(path)
    return path


def test_a_record_is_read_exactly_as_it_was_written(file):
    assert read_record(file) == {}
    write_record(file, RECORD)
    assert read_record(file) == RECORD


def test_keras_loads_a_file_with_a_record(file):
    write_record(file, RECORD)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.load_weights(file)
    if file.suffix == ".keras":
        assert keras.models.load_model(file).count_params() == 3


def write_member(path, text, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("polyak_model.json", text)


def write_attribute(path, value):
    with h5py.File(path, "w") as file:
        file.attrs["polyak_model"] = value


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.keras", lambda path: write_member(path, "[1")),
        ("a.keras", lambda path: write_member(path, "[1]")),
        ("a.keras", lambda path: write_member(path, "[" * 100_000)),
        ("a.keras", lambda path: write_member(path, b"\xff\xfe")),
        ("a.keras", lambda path: write_member(path, '{"a": 1}', zipfile.ZIP_LZMA)),
        ("a.keras", lambda path: write_member(path, '{"a": "' + "x" * 2**21 + '"}')),
        ("a.keras", lambda path: path.write_bytes(b"no archive")),
        ("a.keras", lambda path: path.mkdir()),
        ("a.keras", lambda path: os.mkfifo(path)),
        ("a.keras", lambda path: path.symlink_to("/dev/zero")),
        ("a.keras", lambda path: None),
        ("a.weights.h5", lambda path: write_attribute(path, "[1]")),
        ("a.weights.h5", lambda path: write_attribute(path, 3.5)),
        ("a.weights.h5", lambda path: write_attribute(path, ["a", "b"])),
        ("a.weights.h5", lambda path: write_attribute(path, h5py.Empty("float32"))),
        ("a.weights.h5", lambda path: write_attribute(path, np.zeros(3, "complex64"))),
        ("a.weights.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n")),
        ("a.weights.h5", lambda path: path.mkdir()),
        ("a.weights.h5", lambda path: os.mkfifo(path)),
        ("a.weights.h5", lambda path: path.symlink_to("/dev/zero")),
        ("a.weights.h5", lambda path: None),
    ],
)
def test_whatever_is_wrong_with_a_file_it_has_no_record(tmp_path, name, write):
    write(tmp_path / name)
    assert read_record(tmp_path / name) == {}


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_damage_anywhere_in_a_file_raises_nothing(tmp_path, ending):
    path = WRITERS[ending](tmp_path / f"a{ending}")
    write_record(path, RECORD)
    whole = path.read_bytes()
    generator = random.Random(0)
    found = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 4, 64])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice([len(whole), generator.randrange(len(whole))])])
        found += read_record(path) == RECORD
    assert 0 < found < 500
