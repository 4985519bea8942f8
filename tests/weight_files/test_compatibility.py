import os

import numpy as np
import pytest
from weight_samples import TENSORS, WRITERS, write_hdf5, write_keras, write_shards

from polyak_model.checkpoints import average_files
from polyak_model.errors import InputError


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Averages files and returns the error message; nothing may have changed."""
    monkeypatch.chdir(tmp_path)

    def contents():
        files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        return [(path, path.read_bytes()) for path in files]

    def refused(paths, output):
        before = contents()
        with pytest.raises(InputError) as caught:
            average_files(paths, output)
        assert contents() == before
        assert str(caught.value).isprintable()
        return str(caught.value)

    return refused


@pytest.fixture
def pair(tmp_path):
    return [write_hdf5(tmp_path / f"{n}.weights.h5") for n in "ab"]


def test_a_keras_file_comes_only_from_keras_files(refused, pair, tmp_path):
    assert "only .keras files contain the config" in refused(pair, "out.keras")
    mixed = [write_keras(tmp_path / "a.keras"), pair[0]]
    assert "Choose a name in .weights.h5" in refused(mixed, "out.keras")


@pytest.mark.parametrize("output", ["out.h5", "out", "out.npz", "out.weights.json"])
def test_an_output_with_another_ending_is_refused(refused, pair, output):
    assert "its name must end in .weights.h5 or .keras" in refused(pair, output)


def test_an_output_that_cannot_be_created_is_refused(refused, pair, tmp_path):
    assert "its folder does not exist" in refused(pair, "nowhere/out.weights.h5")
    for folder in ("folder", "folder.weights.h5", "folder.weights.json"):
        (tmp_path / folder).mkdir()
        assert f"{folder}': it is a folder" in refused(pair, folder)
    assert "Cannot write" in refused(pair, "a" * 300 + ".weights.h5")


@pytest.mark.parametrize("link", [os.symlink, os.link, None])
def test_a_file_named_twice_is_refused(refused, pair, link):
    name = pair[0]
    if link:
        name = "again.weights.h5"
        link(pair[0], name)
    assert "are the same one" in refused([*pair, name], "out.weights.h5")
    assert "are the same one" in refused(["a.weights.h5", pair[1], pair[0]], "out.weights.h5")


def test_a_shard_counts_as_a_file(refused, tmp_path):
    shards = write_shards(tmp_path / "a.weights.json")
    again = tmp_path / "b.weights.json"
    again.write_text(shards.read_text())
    assert "are the same one" in refused([shards, again], "out.weights.h5")
    other = write_hdf5(tmp_path / "c.weights.h5")
    assert "it is one of the files" in refused([shards, other], tmp_path / "a_00000.weights.h5")


@pytest.mark.parametrize("link", [os.symlink, os.link, None])
@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
def test_an_output_that_is_an_input_is_refused(refused, tmp_path, link, ending):
    paths = [WRITERS[ending](tmp_path / f"{n}{ending}") for n in "ab"]
    output = paths[1]
    if link:
        output = f"out{ending}"
        link(paths[1], output)
    assert "it is one of the files to read" in refused(paths, output)


def without(name):
    return {key: value for key, value in TENSORS.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (without("layers/dense/vars/1"), "is in 'a.weights.h5' but not in 'b.weights.h5'"),
        (TENSORS | {"vars/0": np.zeros(2)}, "is in 'b.weights.h5' but not in 'a.weights.h5'"),
        (
            TENSORS | {"layers/dense/vars/0": np.zeros((2, 3), "float32")},
            "'layers/dense/vars/0' is float32 (3, 2) and float32 (2, 3)",
        ),
        (
            TENSORS | {"layers/dense/vars/0": np.zeros((3, 2))},
            "'layers/dense/vars/0' is float32 (3, 2) and float64 (3, 2)",
        ),
        (
            TENSORS | {"layers/dense/vars/1": np.zeros(3, "float16")},
            "'layers/dense/vars/1' is bfloat16 (3,) and float16 (3,)",
        ),
    ],
)
def test_files_of_different_models_are_refused(refused, pair, tmp_path, tensors, problem):
    write_hdf5(pair[1], tensors)
    third = write_hdf5(tmp_path / "c.weights.h5")
    line = refused(["a.weights.h5", "b.weights.h5"], "out.weights.h5")
    assert problem in line
    assert "Name files of the same model." in line
    assert "b.weights.h5" in refused([pair[0], third, pair[1]], "out.weights.h5")


@pytest.mark.parametrize("tensors", [{}, {"optimizer/vars/0": np.ones(3)}])
def test_files_without_weights_are_refused(refused, tmp_path, tensors):
    paths = [write_hdf5(tmp_path / f"{n}.weights.h5", tensors) for n in "ab"]
    assert "has no weights" in refused(paths, "out.weights.h5")
