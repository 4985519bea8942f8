import json
import os
import pathlib
import subprocess
import sys

import h5py
import numpy as np
import pytest
from weight_samples import CONFIG, METADATA, TENSORS, WRITERS, write_hdf5, write_shards

from polyak_model.errors import InputError
from polyak_model.weight_files.reader import ENDINGS, KERAS_ENDINGS, find_kind, open_weights


def refused(path):
    with pytest.raises(InputError) as caught, open_weights(path):
        pass
    (line,) = str(caught.value).splitlines()
    assert line.isprintable()
    return line


@pytest.mark.parametrize("ending", KERAS_ENDINGS)
def test_values_dtypes_attributes_and_config_are_those_of_the_file(tmp_path, ending):
    path = WRITERS[ending](tmp_path / f"a{ending}")
    with open_weights(str(path)) as weights:
        assert weights.path == str(path)
        assert weights.variables.keys() == TENSORS.keys()
        for name, expected in TENSORS.items():
            array = weights.variables[name].read()
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            assert array.tobytes() == expected.tobytes()
            assert weights.variables[name].nbytes == expected.nbytes
        assert weights.attributes["layers/dense/vars"] == {"name": "dense"}
        assert weights.attributes["layers"] == {}
        assert (weights.config, weights.metadata) == (
            (CONFIG, METADATA) if ending == ".keras" else (None, None)
        )


def test_a_variable_of_a_closed_file_is_refused(tmp_path):
    with open_weights(write_hdf5(tmp_path / "a.weights.h5")) as weights:
        pass
    with pytest.raises(InputError, match="'layers/dense/vars/0' cannot be read"):
        weights.variables["layers/dense/vars/0"].read()


def test_an_error_of_the_caller_is_not_reported_as_damage(tmp_path):
    with pytest.raises(KeyError), open_weights(write_hdf5(tmp_path / "a.weights.h5")):
        raise KeyError("mine")


@pytest.mark.processes
def test_reading_imports_no_keras(tmp_path):
    write_hdf5(tmp_path / "a.weights.h5")
    program = (
        "import sys; from polyak_model.weight_files.reader import open_weights\n"
        "with open_weights('a.weights.h5') as w: [v.read() for v in w.variables.values()]\n"
        "print({'keras', 'tensorflow'} & set(sys.modules))"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", ["a.h5", "a.npz", "a", "weights.json"])
def test_another_ending_is_refused(name):
    with pytest.raises(InputError, match="must end in one of .weights.h5, .keras, .weights.json"):
        find_kind(name)


def test_a_file_named_h5_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"load_model and save the model as .keras"):
        find_kind("a.h5")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_file_and_a_folder_are_refused(tmp_path, ending):
    assert "No such file or directory. Check the path" in refused(tmp_path / f"a{ending}")
    (tmp_path / f"b{ending}").mkdir()
    assert "it is a folder" in refused(tmp_path / f"b{ending}")
    assert "null" in refused(f"\0{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_pipe_is_refused_without_waiting(tmp_path, ending):
    os.mkfifo(tmp_path / f"a{ending}")
    assert "it is not a regular file" in refused(tmp_path / f"a{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", [b"", b"\0", b"text", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"])
def test_a_file_of_another_format_is_refused(tmp_path, ending, content):
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    assert str(path) in refused(path)


@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
def test_a_truncated_file_is_refused(tmp_path, ending):
    path = WRITERS[ending](tmp_path / f"a{ending}")
    whole = path.read_bytes()
    for part in (0.2, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(part * len(whole))])
        assert "damaged" in refused(path)


def write_map(path, weight_map):
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    "shard",
    ["../a.weights.h5", "/etc/a.weights.h5", "b/a.weights.h5", "..\\a.weights.h5", "\0.weights.h5"],
)
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    path = write_map(tmp_path / "a.weights.json", {"/vars": shard})
    assert "which is elsewhere" in refused(path)


@pytest.mark.parametrize("shard", [7, None, {"a": 1}, "a.npz", ["a", ["b"]]])
def test_an_invalid_name_of_a_shard_is_refused(tmp_path, shard):
    path = write_map(tmp_path / "a.weights.json", {"/vars": shard})
    assert "which is not a shard" in refused(path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "{", "nan", "[" * 10**5])
def test_an_invalid_map_is_refused(tmp_path, content):
    path = tmp_path / "a.weights.json"
    path.write_text(content)
    assert str(path) in refused(path)


def test_a_very_long_map_is_refused(tmp_path):
    path = tmp_path / "a.weights.json"
    with open(path, "wb") as file:
        file.truncate(10**9)
    assert "longer than" in refused(path)


def test_a_map_that_disagrees_with_its_shards_is_refused(tmp_path):
    path = write_shards(tmp_path / "a.weights.json")
    weight_map = json.loads(path.read_text())["weight_map"]
    shards = [shard for names in weight_map.values() for shard in names]
    write_map(path, {**weight_map, "/more/vars": shards[0]})
    assert "disagree about 'more/vars'" in refused(path)
    write_map(path, weight_map)
    (tmp_path / shards[0]).unlink()
    assert "No such file" in refused(path)


def test_a_variable_in_two_shards_is_refused(tmp_path):
    path = write_shards(tmp_path / "a.weights.json")
    weight_map = json.loads(path.read_text())["weight_map"]
    shards = weight_map["/layers/dense/vars"]
    with h5py.File(tmp_path / shards[1], "a") as file:
        file["layers/dense/vars/0"] = np.zeros(3)
    assert "is in two of its shards" in refused(path)


def write_weights_of_keras_2(path, layer_names):
    """Writes weights alone in the layout of Keras 2, which splits a long list of names."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"backend": "tensorflow", "keras_version": "2.13.1"})
        if layer_names == "layer_names":
            del file.attrs["keras_version"]
        file.attrs[layer_names] = [b"dense", b"relu"]
        file["dense/dense/kernel:0"] = np.zeros((2, 3))
        file["dense"].attrs["weight_names"] = [b"dense/kernel:0"]
        file.create_group("relu").attrs["weight_names"] = np.array([])


@pytest.mark.parametrize("layer_names", ["layer_names", "layer_names0"])
def test_weights_in_the_layout_of_keras_2_are_refused_with_the_way_out(tmp_path, layer_names):
    path = tmp_path / "a.weights.h5"
    write_weights_of_keras_2(path, layer_names)
    line = refused(path)
    assert "it has the layout of Keras 2" in line
    assert "model.load_weights if it contains weights alone, and save the model as .keras" in line
    assert "damaged" not in line


@pytest.mark.parametrize("name", ["run", "run.h5", "a.weights.h5", "a.keras", "a.npz"])
def test_a_folder_is_called_a_folder_whatever_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    assert "it is a folder. Name a file in it." in refused(tmp_path / name)
