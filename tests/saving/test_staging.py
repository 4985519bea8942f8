"""A staged file is the one that Keras would have written at that time.

`kinds.check_saving` compares the files of models of every kind.
"""

import keras
import numpy as np
import pytest
from frozen_models import enable_lora_in
from keras_files import contents_of

from polyak_model import PolyakModel, PowerAverage
from polyak_model.saving.staging import stage


def make_trained():
    layers = [keras.layers.Dense(3, "relu"), keras.layers.BatchNormalization()]
    inner = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)])
    inner.compile("adam", "mse", metrics=["mae"])
    model = PolyakModel(inner, PowerAverage.pair(), compensated=True)
    model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0)
    return model


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_it_contains_the_model_as_it_was_staged(tmp_path, ending):
    model = make_trained()
    parts = {"raw": model.raw_model, "average": model.average_models["long"], "both": model}
    staged = {name: stage(part, ending) for name, part in parts.items()}
    for name, part in parts.items():
        if ending == ".keras":
            keras.saving.save_model(part, tmp_path / f"{name}{ending}")
        else:
            keras.Model.save_weights(part, tmp_path / f"{name}{ending}")
    model.fit(np.zeros((8, 3)), np.ones((8, 1)), verbose=0)
    for name in parts:
        staged[name].write(tmp_path / f"staged{ending}")
        assert contents_of(tmp_path / f"staged{ending}") == contents_of(
            tmp_path / f"{name}{ending}"
        )
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}{ending}" for n in (*parts, "staged")
    }


def test_a_layer_that_computes_what_it_saves_is_staged(tmp_path):
    layers = [keras.layers.Embedding(5, 3, dtype="bfloat16"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    enable_lora_in(layers[1], 1)
    for variable in model.weights:
        variable.assign(keras.random.normal(variable.shape, seed=1))
    staged = stage(model, ".keras")
    model.save(tmp_path / "model.keras")
    model.set_weights([np.zeros_like(each) for each in model.get_weights()])
    staged.write(tmp_path / "staged.keras")
    assert contents_of(tmp_path / "staged.keras") == contents_of(tmp_path / "model.keras")


def test_saving_is_as_before_once_a_model_was_staged(tmp_path):
    model = make_trained().raw_model
    model.save(tmp_path / "before.keras")
    stage(model, ".keras")
    model.save(tmp_path / "after.keras")
    assert contents_of(tmp_path / "after.keras") == contents_of(tmp_path / "before.keras")
