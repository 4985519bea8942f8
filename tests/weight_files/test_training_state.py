"""Optimizers and metrics in weight files are recognized whatever their names."""

import numpy as np
import pytest
from weight_samples import write_hdf5

from polyak_model.checkpoints import average_files
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.training_state import find_training_state, split_variables

COUNT, RATE = np.int64(3), np.float32(0.1)
KERNEL = np.ones((3, 2), "float32")
OPTIMIZERS = {
    "plain": [COUNT, RATE],
    "with moments": [COUNT, RATE, KERNEL, KERNEL],
    "with factored moments": [COUNT, RATE, KERNEL[0], KERNEL[:, 0]],
    "under a schedule": [COUNT, KERNEL, KERNEL],
    "with int32 iterations": [np.int32(3), RATE, KERNEL],
}
LAYERS = {
    "dense": [KERNEL, KERNEL[0]],
    "with a counter": [KERNEL, COUNT],
    "with two counters": [COUNT, COUNT, KERNEL],
    "normalization": [KERNEL[0], KERNEL[0], COUNT],
    "counter and a tensor of its own": [COUNT, np.ones((7, 5), "float32")],
    "seeds": [np.array([1, 2], "uint32")],
    "mean metric": [RATE, RATE],
}


def write(folder, group, arrays):
    tensors = {f"{group}/vars/{n}": np.asarray(array) for n, array in enumerate(arrays)}
    return write_hdf5(folder / "a.weights.h5", {"layers/dense/vars/0": KERNEL, **tensors})


@pytest.mark.parametrize("arrays", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    "group", ["optimizer", "gen_opt", "opts/sgd", "layers/net/optimizer", "a/b/layers/net/updater"]
)
def test_an_optimizer_is_recognized_under_any_name(tmp_path, group, arrays):
    with open_weights(write(tmp_path, group, arrays)) as weights:
        assert find_training_state(weights) == ({group}, set())
        model, state = split_variables(weights)
    assert list(model) == ["layers/dense/vars/0"]
    assert len(state) == len(arrays)


@pytest.mark.parametrize("arrays", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("group", ["layers/optimizer", "layers/my_optimizer", "net_optimizer", "a"])
def test_a_layer_is_not_taken_for_an_optimizer(tmp_path, group, arrays):
    with open_weights(write(tmp_path, group, arrays)) as weights:
        assert find_training_state(weights) == (set(), set())


@pytest.mark.parametrize("arrays", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("group", ["layers/optimizer", "layers/net/layers/my_optimizer"])
def test_a_child_of_layers_is_a_layer_whatever_its_variables(tmp_path, group, arrays):
    with open_weights(write(tmp_path, group, arrays)) as weights:
        assert find_training_state(weights) == (set(), set())


def test_metrics_of_tf_keras_are_not_averaged(tmp_path):
    tensors = {
        "layers/metrics/vars/0": KERNEL,
        "metrics/mean/vars/0": RATE,
        "metrics/mean/vars/1": RATE,
    }
    paths = [write_hdf5(tmp_path / f"{n}.weights.h5", tensors) for n in range(2)]
    write_hdf5(paths[1], {"layers/metrics/vars/0": KERNEL})  # Saved without being compiled.
    result = average_files(paths, tmp_path / "average.weights.h5")
    assert (result.averaged, result.copied) == (["layers/metrics/vars/0"], [])
    assert average_files(paths[::-1], tmp_path / "average.weights.h5") == result
    with open_weights(tmp_path / "average.weights.h5") as average:
        assert list(average.variables) == result.averaged
