"""AverageCheckpoint: the file contains the scored weights, also after training was resumed."""

import os
import threading
import time

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from models import (
    LazyClassifier,
    assert_identical,
    compile_classifier,
    make_classifier,
    make_compiled,
)

from polyak_model import AverageCheckpoint, PolyakModel
from polyak_model.saving.staging import StagedFile


@pytest.fixture
def fit(batches):
    """Returns a function that fits with two steps per epoch and returns the history."""

    def fit(model, *callbacks, epochs=4, validate=True, **kwargs):
        return model.fit(
            *batches,
            batch_size=32,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            validation_data=batches if validate else None,
            callbacks=list(callbacks),
            **kwargs,
        ).history

    return fit


def make_model(**kwargs):
    # The loss falls for three epochs, then rises.
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([6], [1.0, -1.0])
    inner = compile_classifier(make_classifier(), keras.optimizers.SGD(rate), run_eagerly=True)
    return PolyakModel(inner, 0.5, **kwargs)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Recorder(keras.callbacks.Callback):
    """Records the weights of both models whenever they are scored."""

    def __init__(self):
        super().__init__()
        self.average, self.raw = [], []

    def on_test_begin(self, logs=None):
        self.average.append(self.model.average_model.get_weights())
        self.raw.append(self.model.raw_model.get_weights())


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_each_kind_of_contents_can_be_loaded(fit, tmp_path, ending):
    model, recorder = make_model(), Recorder()
    files = {kind: tmp_path / f"{kind}{ending}" for kind in ("average", "raw", "both")}
    fit(model, recorder, *(AverageCheckpoint(file, kind) for kind, file in files.items()), epochs=2)
    loaded = {}
    for kind, file in files.items():
        if ending == ".keras":
            loaded[kind] = keras.models.load_model(file)
        else:
            loaded[kind] = make_model() if kind == "both" else make_classifier()
            loaded[kind].load_weights(file)
    assert_identical(loaded["average"].get_weights(), recorder.average[-1])
    assert_identical(loaded["raw"].get_weights(), recorder.raw[-1])
    assert loaded["both"].average_step == 4
    assert_identical(loaded["both"].average_model.get_weights(), recorder.average[-1])


class Spoiler(keras.callbacks.Callback):
    """Changes all weights at the end of every epoch."""

    def on_epoch_end(self, epoch, logs=None):
        for variable in [*self.model.raw_model.weights, *self.model.average_model.weights]:
            variable.assign(variable * 1.01)


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_the_best_file_contains_the_weights_with_the_best_score(fit, tmp_path, order):
    model, recorder = make_model(), Recorder()
    best = AverageCheckpoint(tmp_path / "best.keras", save_best_only=True)
    scores = fit(model, recorder, *[best, Spoiler()][::order], epochs=6)["val_loss"]
    assert 0 < int(np.argmin(scores)) < 5
    assert best.best == min(scores)
    loaded = keras.models.load_model(tmp_path / "best.keras")
    assert_identical(loaded.get_weights(), recorder.average[int(np.argmin(scores))])


@pytest.mark.tensorflow
def test_a_higher_accuracy_is_better(fit, tmp_path):
    model = make_model(report=("average", "raw"))
    path = tmp_path / "{epoch}.weights.h5"
    best = AverageCheckpoint(path, "raw", "val_raw_accuracy", save_best_only=True)
    scores = fit(model, best, epochs=5)["val_raw_accuracy"]
    assert best.best == max(scores) > scores[0]
    improved = [e for e in range(5) if scores[e] > max(scores[:e], default=-1)]
    assert names(tmp_path) == [f"{epoch + 1}.weights.h5" for epoch in improved]


@pytest.mark.tensorflow
def test_nan_is_never_the_best_score(fit, tmp_path):
    best = AverageCheckpoint(tmp_path / "best.keras", save_best_only=True)
    model = make_model()
    fit(model, best, epochs=1)
    score = best.best
    model.average_model.weights[0].assign(model.average_model.weights[0] * np.nan)
    assert np.isnan(fit(model, best, epochs=1)["val_loss"]).all()
    assert best.best == score


def test_batches_are_counted_across_epochs(fit, tmp_path):
    callback = AverageCheckpoint(tmp_path / "{epoch}-{batch}.weights.h5", save_freq=3)
    fit(make_model(), callback, epochs=5)
    assert names(tmp_path) == ["2-1.weights.h5", "3-2.weights.h5", "5-1.weights.h5"]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras takes one step per execution on PyTorch")
def test_batches_of_one_execution_are_counted_as_by_keras(fit, tmp_path):
    inner = compile_classifier(make_classifier(), "sgd", steps_per_execution=2)
    path = tmp_path / "{epoch}.weights.h5"
    theirs = tmp_path / "keras" / path.name
    fit(
        PolyakModel(inner),
        AverageCheckpoint(path, save_freq=4),
        keras.callbacks.ModelCheckpoint(theirs, save_freq=4, save_weights_only=True),
    )
    assert "4.weights.h5" in names(theirs.parent)
    assert names(tmp_path) == [*names(theirs.parent), "keras"]


@pytest.mark.tensorflow
def test_only_the_last_files_of_this_training_and_this_callback_are_kept(fit, tmp_path):
    (tmp_path / "notes.keras").write_text("mine")
    fit(make_model(), AverageCheckpoint(tmp_path / "old-{epoch}.keras"), epochs=1)
    fit(
        make_model(),
        AverageCheckpoint(tmp_path / "{epoch}.keras", keep_last=2),
        AverageCheckpoint(tmp_path / "raw-{epoch}.keras", "raw"),
    )
    others = ["notes.keras", "old-1.keras", *(f"raw-{epoch}.keras" for epoch in range(1, 5))]
    assert names(tmp_path) == ["3.keras", "4.keras", *others]


def test_resumed_training_continues_with_its_best_score_and_its_files(fit, tmp_path):
    def callbacks(folder):
        return (
            AverageCheckpoint(folder / "best.keras", save_best_only=True),
            AverageCheckpoint(folder / "{epoch}.weights.h5", "both", keep_last=2),
        )

    whole = callbacks(tmp_path / "whole")
    fit(make_model(), *whole, epochs=6)
    fit(make_model(), *callbacks(tmp_path / "halves"), epochs=3)
    model = make_model()
    model.load_weights(tmp_path / "halves" / "3.weights.h5")
    resumed = callbacks(tmp_path / "halves")
    fit(model, *resumed, epochs=6, initial_epoch=3)
    assert resumed[0].best == whole[0].best
    assert names(tmp_path / "halves") == names(tmp_path / "whole")
    expected, received = (
        keras.models.load_model(tmp_path / folder / "best.keras") for folder in ("whole", "halves")
    )
    assert_identical(received.get_weights(), expected.get_weights())


@pytest.mark.tensorflow
def test_another_training_starts_without_a_score(fit, tmp_path):
    path = tmp_path / "best.keras"
    first, second = (AverageCheckpoint(path, save_best_only=True) for _ in range(2))
    fit(make_model(), first, epochs=3)
    scores = fit(make_model(), second, epochs=1)["val_loss"]
    assert second.best == scores[0] > first.best
    fit(make_model(), first, epochs=1)
    assert first.best == second.best


# Counters that fall


@pytest.mark.tensorflow
def test_the_newest_files_are_kept_after_the_average_was_reset(fit, tmp_path):
    model, callback = make_model(), AverageCheckpoint(tmp_path / "{epoch}.keras", keep_last=2)
    fit(model, callback, epochs=4)
    model.reset_average()
    fit(model, callback, epochs=6, initial_epoch=4)
    assert names(tmp_path) == ["5.keras", "6.keras"]


@pytest.mark.tensorflow
def test_the_newest_files_are_kept_after_training_went_back_to_an_earlier_one(fit, tmp_path):
    path = tmp_path / "{epoch}.weights.h5"
    fit(make_model(), AverageCheckpoint(path, "both", keep_last=4), epochs=5)
    model = make_model()
    model.load_weights(tmp_path / "2.weights.h5")
    fit(model, AverageCheckpoint(path, "both", keep_last=2), epochs=4, initial_epoch=2)
    assert names(tmp_path) == ["3.weights.h5", "4.weights.h5"]
    model.load_weights(tmp_path / "4.weights.h5")
    assert model.average_step == 8


def test_the_newest_file_is_kept_between_the_batches_of_one_step(fit, tmp_path):
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=4)
    model = PolyakModel(compile_classifier(make_classifier(), optimizer, run_eagerly=True))
    path = tmp_path / "{epoch}-{batch}.weights.h5"
    kept = []
    fit(
        model,
        AverageCheckpoint(path, save_freq=1, keep_last=1, save_on_background=False),
        keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: kept.append(names(tmp_path))
        ),
        epochs=3,
    )
    assert kept == [[f"{epoch}-{batch}.weights.h5"] for epoch in (1, 2, 3) for batch in (1, 2)]


@pytest.mark.tensorflow
def test_the_best_file_is_kept_after_the_average_was_reset(fit, tmp_path):
    model = make_model()
    best = AverageCheckpoint(tmp_path / "{epoch}.keras", save_best_only=True, keep_last=1)
    scores = fit(model, best, epochs=2)["val_loss"]
    model.reset_average()
    scores += fit(model, best, epochs=3, initial_epoch=2)["val_loss"]
    assert min(scores) == scores[2] == best.best
    assert names(tmp_path) == ["3.keras"]


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", ["best.keras", "{epoch}.best.keras"])
@pytest.mark.parametrize("same_callback", [True, False])
def test_a_training_that_went_back_has_the_best_score_of_before(fit, tmp_path, name, same_callback):
    def make_best():
        return AverageCheckpoint(tmp_path / name, save_best_only=True)

    optimizer = keras.optimizers.SGD(1.0)
    inner = compile_classifier(make_classifier(), optimizer, run_eagerly=True)
    model, best = PolyakModel(inner, 0.5), make_best()
    both = AverageCheckpoint(tmp_path / "{epoch}.weights.h5", "both")
    scores = fit(model, best, both, epochs=3)["val_loss"]
    assert scores[2] < scores[1] < scores[0]
    model.load_weights(tmp_path / "2.weights.h5")
    optimizer.learning_rate = 0.001
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(again.best)
    )
    again = best if same_callback else make_best()
    scores[2:] = fit(model, again, look, epochs=3, initial_epoch=2)["val_loss"]
    assert seen[0] == scores[1]
    assert again.best == min(scores)


@pytest.mark.tensorflow
def test_a_callback_that_loads_an_earlier_file_between_epochs_takes_its_score_back(fit, tmp_path):
    def go_back(epoch, logs):
        if epoch == 2:
            model.load_weights(tmp_path / "1.weights.h5")

    model = make_model()
    best = AverageCheckpoint(tmp_path / "best.keras", save_best_only=True)
    both = AverageCheckpoint(tmp_path / "{epoch}.weights.h5", "both")
    seen = []
    fit(
        model,
        best,
        both,
        keras.callbacks.LambdaCallback(
            on_epoch_end=go_back, on_train_batch_begin=lambda batch, logs: seen.append(best.best)
        ),
        epochs=4,
    )
    assert seen[6] == seen[2] > seen[4]


@pytest.mark.tensorflow
def test_a_training_that_is_compiled_anew_and_reset_keeps_its_best_score(fit, tmp_path):
    model, best = make_model(), AverageCheckpoint(tmp_path / "best.keras", save_best_only=True)
    scores = fit(model, best, epochs=3)["val_loss"]
    compile_classifier(model, keras.optimizers.SGD(-1.0), run_eagerly=True)
    model.reset_average()
    assert min(fit(model, best, epochs=1)["val_loss"]) > min(scores) == best.best


@pytest.mark.tensorflow
def test_weights_that_change_between_fits_without_a_step_keep_the_best_score(fit, tmp_path):
    model, best = make_model(), AverageCheckpoint(tmp_path / "best.keras", save_best_only=True)
    stop = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
    scores = fit(model, best, stop, epochs=6)["val_loss"]
    assert best.best == min(scores) < scores[-1]
    scores += fit(model, best, epochs=1)["val_loss"]
    model.apply_average()
    model.raw_model.set_weights([0.9 * weight for weight in model.raw_model.get_weights()])
    scores += fit(model, best, epochs=1)["val_loss"]
    assert best.best == min(scores)


@pytest.mark.tensorflow
def test_a_score_whose_file_could_not_be_written_is_not_the_best(fit, tmp_path):
    (tmp_path / "best.keras").mkdir()
    model, best = make_model(), AverageCheckpoint(tmp_path / "best.keras", save_best_only=True)
    with pytest.raises(OSError, match="folder"):
        fit(model, best, epochs=1)
    assert best.best is None
    (tmp_path / "best.keras").rmdir()
    scores = fit(model, best, epochs=1)["val_loss"]
    assert best.best == scores[0]
    assert names(tmp_path) == ["best.keras"]


@pytest.mark.tensorflow
@pytest.mark.parametrize("order", [1, -1], ids=["checkpoint first", "backup first"])
def test_a_best_score_after_the_last_backup_does_not_count_once_training_resumes(
    fit, tmp_path, order
):
    def callbacks():
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        return AverageCheckpoint(tmp_path / "best.keras", save_best_only=True), backup

    def interrupt(epoch, logs):
        if epoch == 2:
            raise RuntimeError("interrupted")

    best, backup = callbacks()
    interruption = keras.callbacks.LambdaCallback(on_epoch_end=interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(make_model(), *[best, interruption][::order], backup)
    abandoned = best.best
    best, backup = callbacks()
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(best.best)
    )
    fit(make_model(), *[best, backup][::order], look, epochs=3)
    assert seen[0] > abandoned == best.best


def test_a_lazily_built_model_is_saved(fit, tmp_path):
    inner = compile_classifier(LazyClassifier(), run_eagerly=True)
    best = AverageCheckpoint(tmp_path / "best.weights.h5", save_best_only=True)
    scores = fit(PolyakModel(inner), best, epochs=2)["val_loss"]
    assert best.best == min(scores)


# Refused


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contents": None}, "`contents` must be 'average', the name of an average, 'raw' or 'bo"),
        ({"filepath": "best.h5"}, "`filepath` must end with '.keras'.*filepath='best.h5'"),
        ({"mode": "least"}, "`mode` must be one of"),
        ({"save_freq": 0}, "`save_freq` counts batches.*at least 1. Received: save_freq=0"),
        ({"save_freq": "batch"}, "`save_freq` counts batches, if not 'epoch'"),
        ({"save_freq": 5, "save_best_only": True}, "needs the score of a whole epoch"),
        ({"keep_last": 2}, "`keep_last` needs a filepath with a placeholder"),
        ({"keep_last": 0, "filepath": "{epoch}.keras"}, "`keep_last` counts files.*at least 1"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AverageCheckpoint(**{"filepath": "best.keras", **arguments})


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"contents": "raw"}, {}, "'val_loss', a score of the average model. Monitor 'val_raw_los"),
        ({"monitor": "loss"}, {}, "'loss', a score of the raw model. Monitor 'val_loss'"),
        ({}, {"inference": "raw"}, "a score of the raw model. Monitor 'val_average_loss'"),
        ({}, {"inference": "ensemble"}, "a score of the ensemble model.*save contents='both'"),
        (
            {"monitor": "val_raw_loss"},
            {"report": ("average", "raw")},
            "contents='average' and monitor='val_raw_loss', a score of the raw model",
        ),
    ],
)
def test_saving_another_model_than_the_one_scored_is_refused_before_the_first_step(
    fit, tmp_path, arguments, options, message
):
    model = make_model(**options)
    callback = AverageCheckpoint(tmp_path / "best.keras", save_best_only=True, **arguments)
    with pytest.raises(ValueError, match=message):
        fit(model, callback)
    assert model.average_step == 0


@pytest.mark.tensorflow
def test_a_model_that_is_not_wrapped_is_refused(fit, tmp_path):
    with pytest.raises(TypeError, match="the fit of a Sequential. Wrap the model"):
        fit(make_compiled("sgd"), AverageCheckpoint(tmp_path / "best.keras"))


@pytest.mark.tensorflow
def test_a_score_of_unknown_direction_is_refused_after_one_batch(fit, tmp_path):
    model = make_model()
    callback = AverageCheckpoint(tmp_path / "a.keras", monitor="val_x", save_best_only=True)
    with pytest.raises(ValueError, match="`mode` must be 'min' or 'max' for monitor='val_x'"):
        fit(model, callback)
    assert model.average_step == 1


@pytest.mark.tensorflow
def test_a_score_missing_from_the_logs_is_refused_and_the_logs_are_listed(fit, tmp_path):
    callback = AverageCheckpoint(tmp_path / "a.keras", monitor="val_x", mode="min")
    callback.save_best_only = True
    with pytest.raises(ValueError, match=r"monitor='val_x'. The logs have \['accuracy', 'loss'"):
        fit(make_model(), callback)


@pytest.mark.tensorflow
def test_a_warning_says_that_nothing_is_saved_without_validation(fit, tmp_path):
    best = AverageCheckpoint(tmp_path / "best.keras", save_best_only=True)
    with pytest.warns(UserWarning, match="Nothing was saved after epoch 1: .* validation_data"):
        fit(make_model(), best, epochs=1, validate=False)
    assert not os.listdir(tmp_path)


@pytest.mark.tensorflow
def test_a_score_that_another_callback_adds_can_be_monitored(fit, tmp_path):
    added = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(val_rank=[3, 1, 2][epoch])
    )
    best = AverageCheckpoint(
        tmp_path / "{epoch}-{val_rank}.weights.h5",
        monitor="val_rank",
        mode="min",
        save_best_only=True,
    )
    fit(make_model(), added, best, epochs=3)
    assert best.best == 1
    assert names(tmp_path) == ["1-3.weights.h5", "2-1.weights.h5"]


class Watch(keras.callbacks.Callback):
    """Lists the files of a folder at the beginning of each epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.seen = folder, []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(names(self.folder))


def test_training_goes_on_while_a_file_is_written(fit, tmp_path, monkeypatch):
    go_on, watch, write = threading.Event(), Watch(tmp_path), StagedFile.write

    def hold(staged, path):
        assert go_on.wait(60)
        write(staged, path)

    class GoOn(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if watch.seen[1:]:
                go_on.set()

    monkeypatch.setattr(StagedFile, "write", hold)
    best = AverageCheckpoint(tmp_path / "{epoch}.keras")
    fit(make_model(), best, watch, GoOn(), epochs=2)
    assert not any(name.endswith(".keras") for name in watch.seen[1])
    assert names(tmp_path) == ["1.keras", "2.keras"]


def test_a_file_is_complete_before_training_goes_on_if_that_is_asked_for(fit, tmp_path):
    watch = Watch(tmp_path)
    checkpoint = AverageCheckpoint(tmp_path / "{epoch}.keras", save_on_background=False)
    fit(make_model(), checkpoint, watch, epochs=3)
    assert watch.seen == [[], ["1.keras"], ["1.keras", "2.keras"]]


def test_a_callback_can_load_the_file_that_is_being_written(fit, tmp_path, monkeypatch):
    path, write, steps = tmp_path / "both.weights.h5", StagedFile.write, []

    def take_time(staged, partial):
        time.sleep(0.5)
        write(staged, partial)

    class Load(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.load_weights(path)
            steps.append(self.model.average_step)

    monkeypatch.setattr(StagedFile, "write", take_time)
    fit(make_model(), AverageCheckpoint(path, contents="both"), Load(), epochs=2)
    assert steps == [2, 4]


def test_files_written_in_the_background_are_those_written_at_once(fit, tmp_path):
    for folder, background in (("now", False), ("later", True)):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        checkpoints = [
            AverageCheckpoint(
                tmp_path / folder / f"{contents}-{{epoch}}.keras",
                contents,
                save_on_background=background,
            )
            for contents in ("average", "raw", "both")
        ]
        fit(make_model(), *checkpoints, epochs=2)
    assert len(names(tmp_path / "now")) == 6
    assert names(tmp_path / "now") == names(tmp_path / "later")
    for name in names(tmp_path / "now"):
        loaded = [keras.models.load_model(tmp_path / each / name) for each in ("now", "later")]
        assert_identical(*(model.get_weights() for model in loaded))


def test_an_error_of_writing_in_the_background_ends_the_training(fit, tmp_path):
    (tmp_path / "1.keras").mkdir()
    model = make_model()
    with pytest.raises(OSError, match=r"1\.keras'.*folder"):
        fit(model, AverageCheckpoint(tmp_path / "{epoch}.keras"), epochs=4)
    assert 2 <= model.average_step <= 4
    # It was raised once.
    fit(model, AverageCheckpoint(tmp_path / "after-{epoch}.keras"), epochs=1)
    assert names(tmp_path) == ["1.keras", "after-1.keras"]


def test_a_file_in_the_place_of_a_folder_ends_the_training_at_once(fit, tmp_path):
    (tmp_path / "a").touch()
    model = make_model()
    with pytest.raises(OSError, match=r"Cannot create the folder '.*a': a file has its name"):
        fit(model, AverageCheckpoint(tmp_path / "a" / "{epoch}.keras"), epochs=4)
    assert model.average_step == 2
