"""AverageMonitor: what it adds to the logs, and where they are read."""

import csv
import itertools
import sys
import time

import keras
import numpy as np
import pytest
from frameworks import BACKEND

from polyak_model import AverageMonitor, ExponentialAverage, PolyakModel, UniformAverage

NAMES = ["raw_moved", "average_distance", "average_moved"]
NAMES += ["average_effective_iterates", "average_mean_age"]


def wrapped(average=0.8, seed=0, **compilation):
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((6,)), keras.layers.Dense(5, "relu", name="hidden")]
    inner = keras.Sequential([*layers, keras.layers.Dense(1, name="output")])
    model = PolyakModel(inner, average)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", **compilation)
    return model


X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = X[:, :1] * 2


def fit(model, *callbacks, epochs=3, **settings):
    settings = {"batch_size": 8, "shuffle": False, "verbose": 0, **settings}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **settings).history


class Recorder(keras.callbacks.Callback):
    """Records the weights of both models after each epoch, and before the first."""

    def __init__(self, batches=False):
        self.weights, self.batches, self.logs = [], batches, []

    def _record(self, logs=None):
        models = (self.model.raw_model, self.model.average_model)
        self.weights.append([[np.float64(w) for w in m.get_weights()] for m in models])
        self.logs.append(dict(logs or {}))

    def on_train_begin(self, logs=None):
        self._record()

    def on_train_batch_end(self, batch, logs=None):
        if self.batches:
            self._record(logs)

    def on_epoch_end(self, epoch, logs=None):
        if not self.batches:
            self._record(logs)


def norm(tensors):
    return np.linalg.norm(np.concatenate([t.ravel() for t in tensors]))


def relative(ones, others, raw):
    return norm([a - b for a, b in zip(ones, others, strict=True)]) / norm(raw)


def expected_rows(weights):
    for (old_raw, old_average), (raw, average) in itertools.pairwise(weights):
        yield [
            relative(raw, old_raw, raw),
            relative(average, raw, raw),
            relative(average, old_average, raw),
        ]


# PyTorch's compiler takes a minute, see tests/backend/test_torch.py.
SETTINGS = [{}, {"run_eagerly": True}, *([{"jit_compile": True}] if BACKEND != "torch" else [])]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_logs_have_distances_that_numpy_computes_from_the_weights(settings):
    recorder, model = Recorder(), wrapped(**settings)
    history = fit(model, AverageMonitor(), recorder)
    received = np.transpose([history[name] for name in NAMES[:3]])
    np.testing.assert_allclose(received, list(expected_rows(recorder.weights)), rtol=1e-5)


def test_the_logs_have_what_the_rule_remembers():
    model = wrapped(UniformAverage(start_step=2, update_every=3))
    history = fit(model, AverageMonitor())
    assert history["average_mean_age"] == [model.rule.mean_age(n) for n in (4, 8, 12)]
    expected = [model.rule.effective_iterates(n) for n in (4, 8, 12)]
    assert history["average_effective_iterates"] == expected


def test_each_of_several_averages_is_measured_as_it_would_be_alone():
    rules = {"short": ExponentialAverage(0.5), "long": UniformAverage(start_step=3)}
    history = fit(wrapped(rules), AverageMonitor())
    for name, rule in rules.items():
        alone = fit(wrapped(rule), AverageMonitor())
        assert history["raw_moved"] == alone["raw_moved"]
        for quantity in ("distance", "moved", "effective_iterates", "mean_age"):
            received, expected = history[f"{name}_{quantity}"], alone[f"average_{quantity}"]
            np.testing.assert_allclose(received, expected, rtol=1e-6)


def test_training_is_the_same_with_and_without_it():
    plain, watched = wrapped(), wrapped()
    expected, received = fit(plain), fit(watched, AverageMonitor(per_layer=True))
    assert received["loss"] == expected["loss"]
    for one, other in zip(plain.get_weights(), watched.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_callbacks_after_it_read_the_logs_of_every_epoch(tmp_path):
    path = tmp_path / "log.csv"
    history = fit(wrapped(), AverageMonitor(), keras.callbacks.CSVLogger(path), epochs=2)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for name in NAMES:
        assert [float(row[name]) for row in rows] == history[name]


def test_it_measures_every_few_batches_and_the_epoch_has_the_last_measurement():
    recorder, monitor = Recorder(batches=True), AverageMonitor(every=3)
    history = fit(wrapped(), monitor, recorder)
    assert monitor.history["step"] == [3, 6, 9, 12]
    assert ["raw_moved" in logs for logs in recorder.logs[1:]] == [False, False, True] * 4
    assert history["raw_moved"] == [monitor.history["raw_moved"][i] for i in (0, 1, 3)]
    expected = list(expected_rows(recorder.weights[::3]))
    received = np.transpose([monitor.history[name] for name in NAMES[:3]])
    np.testing.assert_allclose(received, expected, rtol=1e-5)


# On PyTorch, Keras refuses several.
@pytest.mark.parametrize("batches", [1, 2] if BACKEND != "torch" else [1])
def test_batches_are_counted_also_when_keras_runs_several_in_one_call(batches):
    monitor = AverageMonitor(every=4)
    fit(wrapped(steps_per_execution=batches), monitor, epochs=2)
    assert monitor.history["step"] == [4, 8]


def test_an_epoch_that_is_shorter_than_the_distance_of_measurements_is_measured():
    history = fit(wrapped(), AverageMonitor(every=100), epochs=2)
    assert len(history["raw_moved"]) == 2


def test_squares_of_layers_sum_to_those_of_the_model():
    monitor = AverageMonitor(per_layer=True)
    model = wrapped()
    fit(model, monitor, epochs=1)
    assert [path.rpartition("/")[2] for path in monitor.layers] == ["hidden", "output"]
    norms = [norm(layer.get_weights()) for layer in model.raw_model.layers]
    for name in NAMES[:3]:
        parts = [history[name][0] for history in monitor.layers.values()]
        total = monitor.history[name][0] * norm(model.raw_model.get_weights())
        assert np.linalg.norm(np.multiply(parts, norms)) == pytest.approx(total, rel=1e-5)


def test_the_table_has_the_last_measurement_of_each_layer():
    monitor = AverageMonitor(per_layer=True)
    fit(wrapped(), monitor)
    columns = {column.header: list(column.cells) for column in monitor.table().columns}
    assert columns.pop("layer") == list(monitor.layers)
    assert list(columns) == NAMES[:3]
    for name, cells in columns.items():
        assert cells == [f"{history[name][-1]:.3g}" for history in monitor.layers.values()]


def test_the_heat_map_has_a_row_for_each_layer_and_a_column_for_each_measurement():
    monitor = AverageMonitor(every=1, per_layer=True)
    fit(wrapped(), monitor, epochs=4)
    axes = monitor.plot("average_moved").axes[0]
    expected = [history["average_moved"] for history in monitor.layers.values()]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(monitor.layers)
    assert [label.get_text() for label in axes.get_xticklabels()] == [*map(str, range(1, 17, 2))]


@pytest.mark.parametrize(
    ("average", "first"), [(0.9, "average"), ({"short": 0.9, "long": 0.99}, "short")]
)
def test_the_heat_map_shows_the_distance_of_the_first_average_by_default(average, first):
    monitor = AverageMonitor(per_layer=True)
    fit(wrapped(average=average), monitor)
    (image,) = monitor.plot().axes[0].images
    expected = [history[f"{first}_distance"] for history in monitor.layers.values()]
    np.testing.assert_array_equal(image.get_array(), expected)


def test_tensorboard_shows_histograms_of_averages_and_of_their_differences(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util.tensor_util import make_ndarray

    model = wrapped()
    fit(model, AverageMonitor(histograms=tmp_path), epochs=2)
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    paths = [weight.path for weight in model.raw_model.weights]
    expected = {f"{name}/{path}" for path in paths for name in ("average", "average - raw")}
    assert set(events.Tags()["tensors"]) == expected
    raw, average = model.raw_model.get_weights()[0], model.average_model.get_weights()[0]
    for tag, values in (
        (f"average/{paths[0]}", average),
        (f"average - raw/{paths[0]}", average - raw),
    ):
        *_, last = events.Tensors(tag)
        left, right, counts = make_ndarray(last.tensor_proto).T
        assert last.step == 8
        assert counts.sum() == values.size
        assert (left[0], right[-1]) == pytest.approx((values.min(), values.max()), rel=1e-6)


def test_histograms_without_tensorboard_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        AverageMonitor(histograms=tmp_path)


@pytest.mark.parametrize("method", ["table", "plot"])
def test_layers_that_were_not_measured_are_refused(method):
    monitor = AverageMonitor()
    fit(wrapped(), monitor)
    with pytest.raises(ValueError, match=r"per_layer=False and 3 measurements. Pass AverageMon"):
        getattr(monitor, method)()


def test_a_quantity_that_layers_do_not_have_is_refused():
    monitor = AverageMonitor(per_layer=True)
    fit(wrapped(), monitor)
    with pytest.raises(ValueError, match="`name` must be one of 'raw_moved', 'average_distance'"):
        monitor.plot("average_mean_age")


@pytest.mark.parametrize("every", [0, 1.5, "batch", None])
def test_an_invalid_distance_of_measurements_is_refused(every):
    with pytest.raises(ValueError, match="`every` counts batches, if not 'epoch'"):
        AverageMonitor(every)


def test_another_model_is_refused_when_training_begins():
    inner = wrapped().raw_model
    with pytest.raises(TypeError, match="Received: the fit of a Sequential. Wrap the model"):
        fit(inner, AverageMonitor())


def test_weights_of_zero_and_of_16_bits_are_measured():
    dense = keras.layers.Dense(1, kernel_initializer="zeros", dtype="bfloat16")
    model = PolyakModel(keras.Sequential([keras.Input((6,)), dense]), average=0.5)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    history = fit(model, AverageMonitor(), epochs=1)
    assert [history[name] for name in NAMES[:3]] == [[0.0]] * 3


@pytest.mark.tensorflow  # Elsewhere Keras builds the model before.
def test_a_model_that_had_no_weights_moved_by_an_unknown_distance_at_first():
    model = PolyakModel(keras.Sequential([keras.layers.Dense(1)]), average=0.5)
    model.compile(optimizer="sgd", loss="mse")
    history = fit(model, AverageMonitor(), epochs=2)
    for name in ("raw_moved", "average_moved"):
        assert np.isnan(history[name]).tolist() == [True, False]
    assert np.isfinite(history["average_distance"]).all()


def test_a_resumed_training_logs_what_an_uninterrupted_one_does(tmp_path):
    expected = fit(wrapped(), AverageMonitor(), epochs=4)
    model = wrapped()
    fit(model, AverageMonitor(), epochs=2)
    model.save(tmp_path / "both.keras")
    resumed = keras.models.load_model(tmp_path / "both.keras")
    received = fit(resumed, AverageMonitor(), epochs=4, initial_epoch=2)
    for name in NAMES:
        assert received[name] == expected[name][2:]


@pytest.mark.slow
def test_it_costs_less_than_one_percent_of_training():
    x = np.random.default_rng(0).normal(size=(6400, 200)).astype("float32")
    layers = [keras.Input((200,)), *(keras.layers.Dense(200, "relu") for _ in range(4))]
    model = PolyakModel(keras.Sequential(layers), ExponentialAverage(0.99))
    model.compile(optimizer="sgd", loss="mse")

    class Timed(AverageMonitor):
        spent = 0.0

        def on_epoch_end(self, epoch, logs=None):
            begin = time.process_time()
            super().on_epoch_end(epoch, logs)
            self.spent += time.process_time() - begin

    monitor = Timed()
    model.fit(x[:8], x[:8], batch_size=8, verbose=0)  # Traces the step.
    begin = time.process_time()
    model.fit(x, x, batch_size=8, epochs=3, verbose=0, callbacks=[monitor])
    share = monitor.spent / (time.process_time() - begin)
    assert share < 0.01
