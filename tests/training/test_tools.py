"""Tools that people use around Keras: search, scikit-learn, loggers, drawing."""

import functools
import inspect
import json
import pickle

import keras
import numpy as np
import pytest

from polyak_model import AverageMonitor, PolyakModel

X = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
Y = X[:, :1] * 2


def build(units=4):
    layers = [keras.Input((3,)), keras.layers.Dense(units, "relu"), keras.layers.Dense(1)]
    model = PolyakModel(keras.Sequential(layers), average=0.9)
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    return model


def fit(model, *callbacks, **settings):
    return model.fit(X, Y, epochs=2, verbose=0, callbacks=list(callbacks), **settings).history


# KerasTuner


@pytest.mark.slow
# KerasTuner itself calls methods that Python has renamed.
@pytest.mark.filterwarnings(r"ignore:(currentThread|getName)\(\) is:DeprecationWarning")
def test_keras_tuner_finds_the_best_average_and_loads_it(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner")
    tuner = keras_tuner.RandomSearch(
        lambda hp: build(hp.Int("units", 2, 8)),
        objective="val_loss",
        max_trials=3,
        directory=tmp_path,
        seed=0,
    )
    held_out = X[:8], Y[:8]
    tuner.search(X, Y, epochs=2, validation_data=held_out, verbose=0)
    (best,) = tuner.get_best_models(1)
    score = tuner.oracle.get_best_trials(1)[0].score
    assert isinstance(best, PolyakModel)
    assert best.evaluate(*held_out, verbose=0)[0] == pytest.approx(score, rel=1e-6)
    for one, other in zip(best.average_model.weights, best.raw_model.weights, strict=True):
        assert np.any(np.array(one) != np.array(other))


# scikit-learn through scikeras


def test_scikeras_fits_scores_searches_and_pickles():
    wrappers = pytest.importorskip("scikeras.wrappers")
    from sklearn.model_selection import GridSearchCV

    # The model is wrapped inside of the function that builds it.
    regressor = wrappers.KerasRegressor(model=build, model__units=5, epochs=2, verbose=0)
    regressor.fit(X, Y[:, 0])
    assert regressor.model_.average_step == 2
    expected = regressor.model_.average_model.predict(X, verbose=0)[:, 0]
    np.testing.assert_array_equal(regressor.predict(X), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(regressor)).predict(X), expected)
    search = GridSearchCV(regressor, {"model__units": [2, 3]}, cv=2, error_score="raise")
    search.fit(X, Y[:, 0])
    assert search.best_estimator_.model_.raw_model.layers[0].units in (2, 3)


# TensorBoard


def test_tensorboard_has_the_logs_of_the_monitor_and_histograms_of_the_raw_weights(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util.tensor_util import make_ndarray

    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)
    model = build()
    history = fit(model, AverageMonitor(), board, validation_split=0.25)
    events = reader.EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    for name in ("average_distance", "raw_moved", "average_mean_age"):
        values = [make_ndarray(e.tensor_proto) for e in events.Tensors(f"epoch_{name}")]
        assert values == pytest.approx(history[name])
    assert {f"{weight.path}/histogram" for weight in model.raw_model.weights} <= tags


def test_the_projector_of_tensorboard_finds_the_embeddings_of_the_raw_model(tmp_path):
    pytest.importorskip("tensorboard.plugins.projector")
    embedding = keras.layers.Embedding(10, 3, name="words")
    layers = [keras.Input((4,)), embedding, keras.layers.Flatten(), keras.layers.Dense(1)]
    texts = {}
    for kind, wrap in (("bare", lambda model: model), ("wrapped", PolyakModel)):
        model = wrap(keras.models.clone_model(keras.Sequential(layers)))
        model.compile(optimizer="adam", loss="mse")
        board = keras.callbacks.TensorBoard(
            tmp_path / kind, embeddings_freq=1, embeddings_metadata={"words": "words.tsv"}
        )
        model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0, callbacks=[board])
        (file,) = (tmp_path / kind).rglob("projector_config.pbtxt")
        texts[kind] = file.read_text()
        assert any((tmp_path / kind).rglob("keras_embedding.ckpt*"))
    assert "words.tsv" in texts["bare"]
    assert texts["wrapped"] == texts["bare"]


# Weights & Biases


class WeightsAndBiasesLike(keras.callbacks.Callback):
    """Reads of a model what the callbacks of Weights & Biases read, and sends it nowhere."""

    def __init__(self):
        super().__init__()
        self.config, self.summary, self.rows = {}, [], []

    def on_train_begin(self, logs=None):
        self.config = {
            "model": json.loads(self.model.to_json()),
            "optimizer": self.model.optimizer.get_config(),
            "loss": self.model.loss,
            "parameters": self.model.count_params(),
            **self.params,
        }
        self.model.summary(print_fn=lambda line, line_break=False: self.summary.append(line))
        self.graph = [(layer.name, type(layer).__name__) for layer in self.model.layers]

    def on_epoch_end(self, epoch, logs=None):
        weights = {
            f"{layer.name}/{weight.path}": np.histogram(keras.ops.convert_to_numpy(weight))
            for layer in self.model.layers
            for weight in layer.trainable_weights
        }
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.rows.append({"epoch": epoch, **logs, **weights, "learning_rate": rate})


def test_a_logger_like_that_of_weights_and_biases_reads_config_summary_layers_and_weights():
    logger, model = WeightsAndBiasesLike(), build()
    history = fit(model, AverageMonitor(), logger)
    assert logger.config["model"]["class_name"] == "PolyakModel"
    assert logger.config["optimizer"]["name"] == "adam"
    assert (logger.config["loss"], logger.config["epochs"]) == ("mse", 2)
    assert model.raw_model.name in "\n".join(logger.summary)
    assert logger.graph == [(layer.name, "Dense") for layer in model.raw_model.layers]
    assert [row["average_distance"] for row in logger.rows] == history["average_distance"]
    tracked = [name for name in logger.rows[0] if name.startswith("dense")]
    assert len(tracked) == len(model.raw_model.weights)


def test_watching_a_model_for_a_logger_changes_no_result():
    plain, watched = build(), build()
    watched.set_weights(plain.get_weights())
    assert fit(watched, WeightsAndBiasesLike(), shuffle=False) == fit(plain, shuffle=False)


# MLflow


class AutologLike:
    """Replaces `keras.Model.fit` as the autologging of MLflow does, and logs to memory."""

    def __init__(self, monkeypatch):
        self.parameters, self.metrics, self.summaries = {}, [], []
        original = keras.Model.fit
        signature = inspect.signature(original)

        @functools.wraps(original)
        def logged(model, *args, **kwargs):
            arguments = signature.bind(model, *args, **kwargs)
            arguments.apply_defaults()
            names = ("epochs", "batch_size", "validation_split", "shuffle", "initial_epoch")
            self.parameters |= {name: arguments.arguments[name] for name in names}
            settings = model.optimizer.get_config()
            self.parameters |= {f"opt_{name}": value for name, value in settings.items()}
            model.summary(print_fn=lambda line, line_break=False: self.summaries.append(line))
            record = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: self.metrics.append(dict(logs))
            )
            arguments.arguments["callbacks"] = [*(arguments.arguments["callbacks"] or ()), record]
            return original(*arguments.args, **arguments.kwargs)

        monkeypatch.setattr(keras.Model, "fit", logged)


def test_autologging_like_that_of_mlflow_logs_parameters_and_metrics(monkeypatch, tmp_path):
    log = AutologLike(monkeypatch)
    model = build()
    history = fit(model, AverageMonitor(), batch_size=8)
    expected = {"epochs": 2, "batch_size": 8, "opt_name": "adam"}
    assert expected.items() <= log.parameters.items()
    for name in ("loss", "average_mean_age"):
        assert [row[name] for row in log.metrics] == history[name]
    assert model.raw_model.name in "\n".join(log.summaries)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


# Drawing


def test_a_model_is_drawn_as_one_box_and_its_parts_as_plain_models():
    pytest.importorskip("pydot")
    model = build()
    to_dot = keras.utils.model_to_dot  # What `plot_model` gives to Graphviz.
    assert "(PolyakModel)" in str(to_dot(model, show_shapes=True, expand_nested=True))
    for part in (model.raw_model, model.average_model):
        drawing = str(to_dot(part, show_shapes=True))
        assert all(layer.name in drawing for layer in part.layers)
