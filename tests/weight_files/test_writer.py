import h5py
import numpy as np
import pytest
from weight_samples import TENSORS, WRITERS, write_hdf5

from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.writer import create_groups, create_variable, created_weights


@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
def test_a_file_copied_tensor_by_tensor_is_the_same(tmp_path, ending):
    path = WRITERS[ending](tmp_path / f"a{ending}")
    copy = tmp_path / "copies" / f"a{ending}"
    copy.parent.mkdir()
    with open_weights(path) as weights:
        with created_weights(copy, like=weights) as target:
            create_groups(target, weights.attributes)
            for name, variable in weights.variables.items():
                write = create_variable(target, name, variable.shape, variable.dtype)
                write((), variable.read())
        with open_weights(copy) as copied:
            assert copied.attributes == weights.attributes
            assert copied.metadata == weights.metadata
            for name, array in TENSORS.items():
                assert copied.variables[name].dtype == weights.variables[name].dtype
                assert copied.variables[name].read().tobytes() == array.tobytes()
    assert [place.name for place in copy.parent.iterdir()] == [copy.name]


def test_bfloat16_is_marked_as_by_keras(tmp_path):
    with open_weights(write_hdf5(tmp_path / "a.weights.h5")) as weights:
        variable = weights.variables["layers/dense/vars/1"]
        with h5py.File(tmp_path / "b.h5", "w") as file:
            write = create_variable(file, variable.name, variable.shape, variable.dtype)
            write((slice(0, 2),), variable.read()[:2])
            dataset = file[variable.name]
            assert (dataset.dtype, dataset.attrs["dtype"]) == (np.dtype("V2"), "bfloat16")


def test_a_failed_write_is_reported_in_one_line(tmp_path):
    path = tmp_path / "a.weights.h5"
    with (
        open_weights(write_hdf5(path)) as weights,
        pytest.raises(OSError, match="unable to") as caught,
        created_weights(tmp_path / "nowhere" / "b.weights.h5", like=weights),
    ):
        pass
    assert str(caught.value).isprintable()
