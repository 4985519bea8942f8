import json
import sys
import zipfile

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers
from wrappers import INPUTS, TARGETS, make_functional, make_sequential

from polyak_model.errors import InputError
from polyak_model.scoring import Scorer, load_model

DATA = (INPUTS, TARGETS)


def compiled(model, **options):
    defaults = {"optimizer": "adam", "loss": "mse", "metrics": ["mae"], "run_eagerly": True}
    model.compile(**defaults | options)
    return model


def make_scorer(metric="loss", model=None, data=DATA, batch_size=5):
    return Scorer(model or compiled(make_sequential()), data, metric, batch_size)


def save(model, path):
    """Saves a model under random weights, which it returns."""
    generator = np.random.default_rng(1)
    model.set_weights([generator.uniform(0.5, 1.5, w.shape) for w in model.weights])
    model.save(path) if path.suffix == ".keras" else model.save_weights(path)
    return model.get_weights()


def reload(path):
    with zipfile.ZipFile(path) as archive:
        return load_model(path, json.loads(archive.read("config.json")))


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5"])
def test_weights_are_read_from_files_in_float64(tmp_path, name):
    expected = save(compiled(make_sequential()), tmp_path / name)
    for array, original in zip(make_scorer().read(tmp_path / name), expected, strict=True):
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, original)


@pytest.mark.parametrize(("metric", "index"), [("loss", 0), ("mae", 1)])
def test_the_score_is_what_keras_evaluates(tmp_path, metric, index):
    model = compiled(make_sequential())
    save(model, tmp_path / "a.weights.h5")
    expected = model.evaluate(*DATA, batch_size=5, verbose=0)[index]
    scorer = make_scorer(metric)
    assert scorer.score(list(scorer.read(tmp_path / "a.weights.h5"))) == expected


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_weights_of_lower_precision_are_read_and_given_back_unchanged(tmp_path, policy):
    default = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(make_functional())
        expected = save(model, tmp_path / "a.weights.h5")
        scorer = make_scorer(model=compiled(make_functional()))
        weights = list(scorer.read(tmp_path / "a.weights.h5"))
        assert {array.dtype.name for array in weights} == {"float64"}
        scorer.assign([np.zeros_like(array) for array in weights])
        scorer.assign(weights)
        for array, original in zip(scorer.model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(array, original)
        assert expected[0].dtype in (np.float16, ml_dtypes.bfloat16)
    finally:
        keras.config.set_dtype_policy(default)


def test_a_metric_that_the_model_was_not_compiled_with_is_found_by_name():
    scorer = make_scorer("mean_absolute_percentage_error")
    errors = np.abs((TARGETS - scorer.model.predict(INPUTS, verbose=0)) / TARGETS)
    score = scorer.score(scorer.model.get_weights())
    np.testing.assert_allclose(score, 100 * errors.mean(), rtol=1e-5)


def test_a_model_that_was_never_compiled_is_scored_by_a_metric():
    model = make_functional()
    scorer = make_scorer("mae", model)
    errors = np.abs(TARGETS - model(INPUTS).numpy())
    np.testing.assert_allclose(scorer.score(model.get_weights()), errors.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("loss", "min"),
        ("mae", "min"),
        ("cosine_similarity", "max"),
        ("TruePositives", None),
    ],
)
def test_the_direction_of_a_metric_is_the_one_in_keras(metric, direction):
    assert make_scorer(metric).direction() == direction


def test_several_inputs_and_outputs_are_lists(tmp_path):
    left, right = keras.Input((6,)), keras.Input((2,))
    outputs = [layers.Dense(2)(layers.Concatenate()([left, right])), layers.Dense(1)(left)]
    model = compiled(keras.Model([left, right], outputs), loss=["mse", "mse"], metrics=None)
    data = ([INPUTS, TARGETS], [TARGETS, TARGETS[:, :1]])
    expected = model.evaluate(*data, batch_size=5, verbose=0, return_dict=True)["loss"]
    assert make_scorer(model=model, data=data).score(model.get_weights()) == expected


def test_a_normalization_layer_uses_the_weights_assigned_to_it():
    model = compiled(keras.Sequential([keras.Input((6,)), layers.Normalization()]))
    model.layers[0].adapt(INPUTS)
    scorer = make_scorer(model=model, data=(INPUTS, INPUTS))
    mean, variance, count = model.get_weights()
    assert scorer.score([mean, variance, count]) > 0
    assert scorer.score([0 * mean, 0 * variance + 1, count]) == 0


def test_the_saved_model_is_compiled_as_it_was_with_a_fresh_optimizer(tmp_path):
    model = compiled(make_sequential(), optimizer=keras.optimizers.Adam(0.25))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(7)
    scorer = make_scorer("cosine_similarity", model)
    scorer.assign([np.ones_like(array) for array in model.get_weights()])
    scorer.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    assert all((array == 1).all() for array in loaded.get_weights())
    assert sorted(loaded.evaluate(*DATA, verbose=0, return_dict=True)) == ["loss", "mae"]
    assert (float(loaded.optimizer.learning_rate), int(loaded.optimizer.iterations)) == (0.25, 0)


def test_a_model_that_was_never_compiled_is_saved_uncompiled(tmp_path):
    scorer = make_scorer("mae", make_functional())
    scorer.save(tmp_path / "a.keras")
    scorer.save(tmp_path / "a.weights.h5")
    assert not keras.models.load_model(tmp_path / "a.keras").compiled


def test_a_model_of_keras_layers_is_loaded(tmp_path):
    inputs = keras.Input((5, 6))
    hidden = layers.Bidirectional(layers.LSTM(3, activation=keras.ops.tanh))(inputs)
    outputs = layers.Dense(2, kernel_regularizer="l2")(hidden[:, :4] * 2.0)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.Adam(schedule),
        loss=keras.losses.mean_squared_error,
        metrics=[keras.metrics.R2Score(), keras.metrics.mean_absolute_error],
    )
    model.save(tmp_path / "a.keras")
    assert reload(tmp_path / "a.keras").count_params() == model.count_params()


@pytest.fixture
def refused():
    """Returns the message of a refusal, which is one line."""

    def refused(action, *arguments, **options):
        with pytest.raises(InputError) as caught:
            action(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


def test_no_code_from_a_file_is_run(tmp_path, monkeypatch, refused):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap.py").write_text("raise SystemExit('code of a file was run')")
    model = keras.Sequential([keras.Input((6,)), layers.Activation("relu")])
    config = json.loads(model.to_json())
    config["config"]["layers"][1]["config"]["activation"] = {
        "module": "trap",
        "class_name": "function",
        "config": "spring",
    }
    message = refused(load_model, tmp_path / "a.keras", config)
    assert "it needs 'spring' of 'trap', which is not part of Keras" in message
    assert "trap" not in sys.modules


def test_lambda_layers_and_custom_classes_are_refused(tmp_path, refused):
    @keras.saving.register_keras_serializable(package="gone")
    class Own(layers.Layer):
        pass

    for layer, needed in ((layers.Lambda(lambda x: x), "a layer Lambda"), (Own(), "'Own'")):
        keras.Sequential([keras.Input((6,)), layer]).save(tmp_path / "a.keras")
        assert f"it needs {needed}" in refused(reload, tmp_path / "a.keras")


def test_a_file_that_keras_cannot_load_is_refused(tmp_path, refused):
    config = {"module": "keras", "class_name": "Sequential", "config": {"layers": 1}}
    assert "Keras cannot load it" in refused(load_model, tmp_path / "a.keras", config)
    make_functional().save_weights(tmp_path / "a.weights.h5")
    weights = make_scorer().read(tmp_path / "a.weights.h5")
    assert "a.weights.h5': Keras cannot load it" in refused(list, weights)


def test_a_metric_that_keras_cannot_compute_is_refused(refused):
    message = refused(make_scorer, "nonsense")
    assert "`--metric` must be one of ['loss', 'mae'], or one that Keras" in message
    assert "Received: 'nonsense', but Keras says: Could not interpret" in message
    assert "without being compiled" in refused(make_scorer, "loss", make_functional())


def test_data_of_another_shape_is_refused(refused):
    message = refused(make_scorer, data=(INPUTS[:, :3], TARGETS))
    assert "Cannot score the model on the arrays of `--data`" in message


def test_a_model_without_weights_is_refused(tmp_path, refused):
    keras.Sequential([keras.Input((6,)), layers.ReLU()]).save(tmp_path / "a.keras")
    assert "it contains no model with weights" in refused(reload, tmp_path / "a.keras")
