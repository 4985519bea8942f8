"""Every callback of Keras works as on the bare model, or is refused."""

import math

import keras
import numpy as np
import pytest
from keras import callbacks, layers
from models import (
    Recorder,
    assert_identical,
    assert_trains_as_bare,
    compile_classifier,
    make_classifier,
    make_compiled,
)

from polyak_model import PolyakModel, PowerAverage

# Functions that make a callback, which may write to the folder.
KINDS = {
    "BackupAndRestore": lambda folder: callbacks.BackupAndRestore(folder / "backup"),
    "CSVLogger": lambda folder: callbacks.CSVLogger(folder / "log.csv"),
    "EarlyStopping": lambda folder: callbacks.EarlyStopping("val_loss", min_delta=9, patience=2),
    "History": lambda folder: callbacks.History(),
    "LambdaCallback": lambda folder: callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (folder / f"{epoch}.txt").write_text(str(logs))
    ),
    "LearningRateScheduler": lambda folder: callbacks.LearningRateScheduler(
        lambda epoch, rate: rate / (1 + epoch)
    ),
    "ModelCheckpoint": lambda folder: callbacks.ModelCheckpoint(
        folder / "{epoch}.weights.h5", save_weights_only=True
    ),
    "ProgbarLogger": lambda folder: callbacks.ProgbarLogger(),
    "ReduceLROnPlateau": lambda folder: callbacks.ReduceLROnPlateau(patience=0, min_delta=9.0),
    "TensorBoard": lambda folder: callbacks.TensorBoard(folder, histogram_freq=1, update_freq=1),
    "TerminateOnNaN": lambda folder: callbacks.TerminateOnNaN(),
}
# TensorBoard's events and the wrapper's weight files differ from those of the bare model.
COMPARED = ("*.csv", "*.txt")


def folders(path):
    """Yields a folder for the bare run, then one for the wrapped run."""
    for name in ("bare", "wrapped"):
        (path / name).mkdir()
        yield path / name


def needs_package(name):
    if name == "TensorBoard":
        pytest.importorskip("tensorboard", reason="recent TensorFlow does not install tensorboard")


def assert_called_as_bare(names, batches, path, **compilation):
    """Compares a bare and a wrapped fit with fresh callbacks, and the files they wrote."""
    written = []
    destinations = folders(path)

    def fit(model, recorder):
        folder = next(destinations)
        model.fit(
            *batches,
            batch_size=32,
            epochs=4,
            verbose=0,
            validation_data=batches,
            callbacks=[recorder, *(KINDS[name](folder) for name in names)],
        )
        files = sorted(file for pattern in COMPARED for file in folder.glob(pattern))
        written.append({file.name: file.read_text() for file in files})
        assert any(folder.iterdir()) or not WRITERS & set(names)

    model = assert_trains_as_bare(fit, lambda: make_compiled(**compilation))
    assert written[0] == written[1]
    return model


WRITERS = {"CSVLogger", "LambdaCallback", "ModelCheckpoint", "TensorBoard"}


def test_every_callback_of_this_keras_is_known():
    shipped = {
        name
        for name, kind in vars(callbacks).items()
        if isinstance(kind, type) and issubclass(kind, callbacks.Callback)
    }
    # The first two are base classes; RemoteMonitor needs a network, OrbaxCheckpoint a package that
    # installs JAX; SwapEMAWeights is refused.
    others = {"Callback", "CallbackList", "RemoteMonitor", "OrbaxCheckpoint", "SwapEMAWeights"}
    assert shipped - others == set(KINDS)


# The others only read, so it is enough to run them together.
ACTING = ("BackupAndRestore", "EarlyStopping", "LearningRateScheduler", "ReduceLROnPlateau")


@pytest.mark.parametrize("name", [*ACTING, "ModelCheckpoint", "TensorBoard"])
def test_a_callback_alone_works_as_on_the_bare_model(name, batches, tmp_path):
    needs_package(name)
    assert_called_as_bare([name], batches, tmp_path)


@pytest.mark.parametrize("order", [1, -1], ids=["in-order", "reversed"])
def test_all_callbacks_together_work_as_on_the_bare_model(order, batches, tmp_path):
    names = [name for name in KINDS if name != "TensorBoard"][::order]
    assert assert_called_as_bare(names, batches, tmp_path).average_step == 6


def test_training_stops_at_the_batch_with_a_nan_loss_as_on_the_bare_model(batches):
    x = np.copy(batches[0])
    x[40] = math.nan
    seen = []
    for wrap in (False, True):
        inner = make_compiled("sgd")
        recorder = Recorder(inner)
        model = PolyakModel(inner, inference="raw") if wrap else inner
        model.fit(
            x,
            batches[1],
            batch_size=16,
            epochs=3,
            verbose=0,
            shuffle=False,
            callbacks=[callbacks.TerminateOnNaN(), recorder],
        )
        seen.append(recorder.weights)
    assert len(seen[0]) < 12
    for one, other in zip(*seen, strict=True):
        assert_identical(one, other)


# Stopping early


@pytest.mark.parametrize("order", [1, -1], ids=["in-order", "reversed"])
def test_early_stopping_among_others_restores_the_best_weights(order, batches, tmp_path):
    model = PolyakModel(compile_classifier(make_classifier(), keras.optimizers.SGD(0.5)), 0.5)
    listed = [
        callbacks.EarlyStopping(patience=0, restore_best_weights=True),
        callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
        callbacks.ReduceLROnPlateau(patience=1),
        callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    scores = model.fit(
        *batches,
        batch_size=16,
        epochs=30,
        verbose=0,
        validation_data=batches,
        callbacks=listed[::order],
    ).history["val_loss"]
    assert len(scores) < 30
    best = keras.models.load_model(tmp_path / "best.keras")
    assert best.average_step == model.average_step == 4 * (1 + int(np.argmin(scores)))
    assert_identical(best.get_weights(), model.get_weights())
    assert_identical(best.average_model.get_weights(), model.average_model.get_weights())
    score = model.evaluate(*batches, batch_size=16, verbose=0)[0]
    assert score == pytest.approx(min(scores), rel=1e-6)


# Stopping and resuming


def make_wrapped(dropout=0.3):
    """Wraps a net with BatchNormalization and dropout; the average starts late and moves rarely."""
    keras.utils.set_random_seed(1)
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Dropout(dropout, seed=1),
            layers.Dense(3, activation="softmax"),
        ]
    )
    compile_classifier(inner, run_eagerly=True)
    rule = PowerAverage(2, start_step=3, update_every=2)
    return PolyakModel(inner, rule, compensated=True)


def fit_in_order(model, x, y, **arguments):
    model.fit(x, y, batch_size=16, verbose=0, shuffle=False, **arguments)


def assert_same_state(expected, received):
    """Compares both models, residuals, step and optimizer bit for bit."""
    assert expected.average_step == received.average_step > 0
    assert_identical(expected.get_weights(), received.get_weights())
    assert_identical(expected.average_model.get_weights(), received.average_model.get_weights())
    variables = [[v.numpy() for v in model.optimizer.variables] for model in (expected, received)]
    assert_identical(*variables)


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_training_resumed_from_the_middle_of_an_epoch_equals_uninterrupted_training(
    ending, batches, tmp_path
):
    x, y = batches
    model = make_wrapped()
    checkpoint = callbacks.ModelCheckpoint(
        tmp_path / ("{epoch}-{batch}" + ending),
        save_freq=3,
        save_weights_only=ending == ".weights.h5",
    )
    fit_in_order(model, x, y, epochs=2, callbacks=[checkpoint])
    assert {file.name for file in tmp_path.iterdir()} == {f"1-3{ending}", f"2-2{ending}"}
    path = tmp_path / f"2-2{ending}"
    if ending == ".keras":
        loaded = keras.models.load_model(path)
    else:
        loaded = make_wrapped()
        loaded.load_weights(path)
    assert loaded.average_step == 6
    fit_in_order(loaded, x[32:], y[32:])
    assert_same_state(model, loaded)


class Interruption(callbacks.Callback):
    """Raises an error in the middle or at the end of the third epoch."""

    def __init__(self, moment):
        super().__init__()
        self.moment = moment

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.moment, self.epoch, batch) == ("middle", 2, 1):
            raise RuntimeError("interrupted")

    def on_epoch_end(self, epoch, logs=None):
        if (self.moment, epoch) == ("end", 2):
            raise RuntimeError("interrupted")


def fit_interrupted(make, moment, folder, batches, epochs=4, order=1, **kwargs):
    """Fits until the interruption, then resumes a fresh model from the backup to the end."""
    model = make()
    listed = [callbacks.BackupAndRestore(folder, **kwargs), Interruption(moment)]
    with pytest.raises(RuntimeError, match="interrupted"):
        fit_in_order(model, *batches, epochs=epochs, callbacks=listed[::order])
    model = make()
    fit_in_order(
        model, *batches, epochs=epochs, callbacks=[callbacks.BackupAndRestore(folder, **kwargs)]
    )
    return model


@pytest.fixture(scope="module")
def uninterrupted():
    """A model that was trained for four epochs, for tests that only look at it."""
    generator = np.random.default_rng(0)
    model = make_wrapped()
    x = generator.normal(size=(64, 6)).astype("float32")
    fit_in_order(model, x, generator.integers(0, 3, size=64), epochs=4)
    return model


@pytest.mark.parametrize(
    ("moment", "order"),
    [("middle", 1), ("end", 1), ("end", -1)],
    ids=["middle", "after-backup", "before-backup"],
)
def test_a_fit_resumed_from_its_backup_equals_an_uninterrupted_fit(
    moment, order, uninterrupted, batches, tmp_path
):
    received = fit_interrupted(make_wrapped, moment, tmp_path / "backup", batches, order=order)
    assert received.average_step == 16
    assert_same_state(uninterrupted, received)


def test_a_fit_resumed_from_the_middle_of_an_epoch_equals_that_of_the_bare_model(batches, tmp_path):
    def make():
        return make_wrapped(dropout=0)  # Keras does not save the seeds of the bare model's dropout.

    bare = fit_interrupted(
        lambda: make().raw_model, "middle", tmp_path / "bare", batches, save_freq=2
    )
    model = fit_interrupted(make, "middle", tmp_path / "wrapped", batches, save_freq=2)
    assert_identical(bare.get_weights(), model.raw_model.get_weights())
    # Keras resumes with the weights from the middle of the epoch, and repeats the whole epoch.
    assert model.average_step == int(bare.optimizer.iterations) == 18


# Refused


def test_a_callback_that_swaps_averages_is_refused_before_anything_changes(batches):
    model = PolyakModel(make_compiled())
    swap = callbacks.SwapEMAWeights(swap_on_epoch=True)
    message = "Received: SwapEMAWeights.*Remove the callback: a PolyakModel evaluates .* already"
    for call in (
        lambda: model.fit(*batches, verbose=0, callbacks=[swap]),
        lambda: model.fit(*batches, verbose=0, callbacks=[[callbacks.History(), swap]]),
        lambda: model.fit(*batches, 16, 1, 0, swap),
        lambda: model.evaluate(*batches, verbose=0, callbacks=[swap]),
        lambda: model.predict(batches[0], verbose=0, callbacks=[swap]),
        lambda: model.fit(*batches, verbose=0, callbacks=callbacks.CallbackList([swap])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.average_step == 0


def test_fit_accepts_positional_arguments(batches):
    model = PolyakModel(make_compiled())
    history = model.fit(*batches, 16, 2, 0, [callbacks.TerminateOnNaN()], 0.25, None, False).history
    assert len(history["val_loss"]) == 2
    assert model.average_step == 6
