import json
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weight_samples import write_keras, write_safetensors

from polyak_model.checkpoints import average_files
from polyak_model.errors import InputError
from polyak_model.weight_files.reader import open_weights

TENSORS = {
    "model.layers.0.weight": np.arange(6, dtype="float32").reshape(3, 2) / 7,
    "norm": np.array([0.5, -1.5, 3.0], ml_dtypes.bfloat16),
    "half": np.array([[0.5]], "float16"),
    "double": np.array(0.1),
    "empty": np.zeros((0, 3), "float32"),
    "position_ids": np.arange(4),
    "mask": np.array([True, False]),
}


def load(path):
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_raw(path, header, data=b""):
    """Writes a file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refused(path):
    with pytest.raises(InputError) as caught, open_weights(path):
        pass
    (line,) = str(caught.value).splitlines()
    assert line.isprintable()
    return line


def test_names_values_dtypes_and_metadata_are_those_of_the_file(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS, {"format": "pt"})
    with open_weights(path) as weights:
        assert weights.metadata == {"format": "pt"}
        assert weights.variables.keys() == TENSORS.keys()
        for name, expected in TENSORS.items():
            array = weights.variables[name].read()
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            assert array.tobytes() == expected.tobytes()


def test_averages_are_computed_tensor_by_tensor_and_keep_dtypes_and_metadata(tmp_path):
    others = {name: (array * 3).astype(array.dtype) for name, array in TENSORS.items()}
    paths = [
        write_safetensors(tmp_path / "a.safetensors", TENSORS),
        write_safetensors(tmp_path / "b.safetensors", others, {"format": "pt"}),
    ]
    output = tmp_path / "average.safetensors"
    result = average_files(paths, output, weights=[1, 3])
    assert set(result.copied) == {"position_ids", "mask"}
    average = load(output)
    assert average.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        pair = [array.astype("float64"), others[name].astype("float64")]
        expected = others[name] if name in result.copied else (0.25 * pair[0] + 0.75 * pair[1])
        assert average[name].shape == array.shape
        np.testing.assert_array_equal(average[name], expected.astype(array.dtype))
    with safetensors.safe_open(output, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_tensor_is_averaged_in_parts(tmp_path):
    arrays = np.random.default_rng(0).normal(size=(2, 1500, 700)).astype("float32")
    paths = [write_safetensors(tmp_path / f"{i}.safetensors", {"a": arrays[i]}) for i in range(2)]
    average_files(paths, tmp_path / "average.safetensors")
    expected = arrays.astype("float64").mean(axis=0).astype("float32")
    np.testing.assert_array_equal(load(tmp_path / "average.safetensors")["a"], expected)


def test_averages_of_keras_files_are_named_by_path_and_have_no_optimizer(tmp_path):
    paths = [write_keras(tmp_path / f"{i}.keras") for i in range(2)]
    average_files(paths, tmp_path / "average.safetensors")
    names = ["layers/dense/vars/0", "layers/dense/vars/1", "layers/dropout/seed_generator/vars/0"]
    assert sorted(load(tmp_path / "average.safetensors")) == names


@pytest.mark.parametrize("name", ["average.weights.h5", "average.keras"])
def test_a_keras_file_cannot_be_made_from_tensors_alone(tmp_path, name):
    paths = [write_safetensors(tmp_path / f"{i}.safetensors") for i in range(2)]
    with pytest.raises(InputError, match=r"tensors alone.*Choose a name in .safetensors"):
        average_files(paths, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_failing_average_leaves_what_was_there(tmp_path):
    broken = {"a": np.array([np.inf], "float32")}
    paths = [write_safetensors(tmp_path / f"{i}.safetensors", broken) for i in range(2)]
    (tmp_path / "average.safetensors").write_bytes(b"before")
    with pytest.raises(InputError, match="'a' contains inf or NaN"):
        average_files(paths, tmp_path / "average.safetensors")
    assert (tmp_path / "average.safetensors").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 3


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": ENTRY}, 7),
        ({"a": ENTRY}, 9),
        ({"a": {**ENTRY, "shape": [3]}}, 8),
        ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, 8),
        ({"a": {**ENTRY, "shape": [-2]}}, 8),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, 8),
        ({"a": ENTRY, "b": ENTRY}, 8),
        ({"a": {**ENTRY, "dtype": "object"}}, 8),
        ({"a": 3}, 8),
        ([ENTRY], 8),
        (b"{", 8),
        (b"\xff" * 8, 8),
        (b"[" * 10**5, 0),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, header, size):
    path = write_raw(tmp_path / "a.safetensors", header, bytes(size))
    assert "it is a damaged safetensors file (" in refused(path)


def test_a_header_that_is_too_long_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")
    assert "its header is longer than 16,777,216 bytes" in refused(path)


def test_a_dtype_without_arithmetic_is_refused_by_name(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}
    path = write_raw(tmp_path / "a.safetensors", {"scaled": entry}, bytes(8))
    assert "'scaled' has dtype F8_E4M3, which is not supported" in refused(path)


def test_a_name_that_controls_a_terminal_is_escaped_in_errors(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}
    path = write_raw(tmp_path / "a.safetensors", {"\x1b[2J": entry}, bytes(8))
    assert "\\x1b[2J" in refused(path)


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "Install it: pip install safetensors" in refused(path)
