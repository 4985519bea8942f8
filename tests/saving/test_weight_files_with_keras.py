"""What is read from the files that Keras writes."""

import inspect

import keras
import numpy as np
import pytest

from polyak_model.errors import InputError
from polyak_model.weight_files.batch_norm_layers import find_batch_statistics
from polyak_model.weight_files.reader import KERAS_ENDINGS, open_weights


@pytest.fixture(scope="module")
def model():
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(3, name="first"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.1),
        keras.layers.Dense(2, dtype="bfloat16"),
    ]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def save(model, path):
    if path.name.endswith(".keras"):
        model.save(path)
    elif path.name.endswith(".json"):
        model.save_weights(path, max_shard_size=1e-7)
    else:
        model.save_weights(path)


@pytest.mark.parametrize("ending", KERAS_ENDINGS)
def test_every_variable_that_keras_saved_is_found_and_read(model, tmp_path, ending):
    options = inspect.signature(model.save_weights).parameters
    if ending == ".weights.json" and "max_shard_size" not in options:
        pytest.skip("this Keras writes no shards")
    path = tmp_path / f"model{ending}"
    save(model, path)
    with open_weights(path) as weights:
        variables = weights.variables
        for layer in model.layers:
            group = next(n for n, a in weights.attributes.items() if a.get("name") == layer.name)
            for n, expected in enumerate(layer.variables):
                variable = variables.get(f"{group}/{n}")
                if variable is not None:
                    assert variable.dtype == expected.dtype
                    assert variable.shape == tuple(expected.shape)
                    np.testing.assert_array_equal(variable.read(), np.array(expected))
        floats = [v for name, v in variables.items() if name.startswith("layers")]
        assert sum(v.dtype != "uint32" for v in floats) == len(model.get_weights())
        assert (weights.config is not None) == (ending == ".keras")
        assert weights.kind == ending


class Held(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(2)
        self.second = keras.layers.BatchNormalization()
        self.blocks = [keras.layers.BatchNormalization(name="mine"), keras.layers.Dense(1)]

    def call(self, inputs):
        return self.blocks[1](self.blocks[0](self.second(self.first(inputs))))


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_layers_of_keras_are_found_at_any_depth(tmp_path, ending):
    model = Held()
    model(np.zeros((2, 2)))
    path = tmp_path / f"a{ending}"
    (model.save if ending == ".keras" else model.save_weights)(path)
    with open_weights(path) as weights:
        assert len(find_batch_statistics(weights)) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_in_the_layout_of_keras_2_is_refused_with_the_way_out(tmp_path, compiled):
    layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.ReLU()]
    legacy = keras.Sequential(layers)
    if compiled:
        legacy.compile("adam", "mse")
    legacy.save(tmp_path / "a.h5")
    (tmp_path / "a.h5").rename(tmp_path / "a.weights.h5")
    refused = pytest.raises(InputError, match="it has the layout of Keras 2")
    with refused, open_weights(tmp_path / "a.weights.h5"):
        pass
    # The way out leads out.
    (tmp_path / "a.weights.h5").rename(tmp_path / "a.h5")
    keras.models.load_model(tmp_path / "a.h5", compile=False).save(tmp_path / "a.keras")
    with open_weights(tmp_path / "a.keras") as weights:
        assert len(weights.variables) == 2
