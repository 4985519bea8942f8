import numpy as np
import pytest
from weight_samples import CONFIG, write_hdf5, write_keras

from polyak_model.weight_files.batch_norm_layers import find_batch_statistics
from polyak_model.weight_files.reader import open_weights


def find(path):
    with open_weights(path) as weights:
        return find_batch_statistics(weights)


@pytest.mark.parametrize(
    ("group", "found"),
    [
        ("layers/batch_normalization", True),
        ("layers/batch_normalization_12", True),
        ("layers/sync_batch_normalization", True),
        ("layers/functional/layers/batch_normalization_1", True),
        ("layers/layer_normalization", False),
        ("layers/my_batch_normalization_head", False),
    ],
)
def test_groups_are_recognized_by_their_names(tmp_path, group, found):
    path = write_hdf5(tmp_path / "a.weights.h5", {f"{group}/vars/0": np.zeros(2)})
    assert find(path) == ([group] if found else [])


@pytest.mark.parametrize("name", ["BatchNormalization", "SyncBatchNormalization"])
def test_layers_are_recognized_by_their_class_in_a_config(tmp_path, name):
    layers = [{"class_name": name, "config": {"name": "bn"}}, {"class_name": "Dense"}]
    config = CONFIG | {"config": {"layers": [{"config": {"layers": layers}}]}}
    assert find(write_keras(tmp_path / "a.keras", config=config)) == ["bn"]
    assert find(write_keras(tmp_path / "b.keras")) == []


@pytest.mark.parametrize("config", [None, 7, [], {"name": 3}])
def test_a_malformed_config_does_no_harm(tmp_path, config):
    layers = [{"class_name": "BatchNormalization", "config": config}, {"class_name": []}, None]
    path = write_keras(tmp_path / "a.keras", config={"layers": layers})
    assert len(find(path)) == 1
