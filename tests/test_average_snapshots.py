import shutil
import threading
from unittest.mock import Mock

import h5py
import keras
import numpy as np
import pytest
from frozen_models import enable_lora_in
from wrappers import INPUTS, KINDS, TARGETS, make_wrapper

from polyak_model import AverageSnapshots, ExponentialAverage, PolyakModel, PowerAverage
from polyak_model.callbacks import snapshots as module
from polyak_model.errors import InputError
from polyak_model.snapshots import rebuild
from polyak_model.snapshots.folder import list_snapshots, read_run
from polyak_model.weight_files.reader import open_weights

width = PowerAverage.from_relative_width
X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
Y = (X @ [[1.0], [-2.0], [0.5]]).astype("float32")


def make_model(rule=None, layers=None, **options):
    keras.utils.set_random_seed(0)
    layers = layers or [keras.layers.Dense(2, "tanh"), keras.layers.Dense(1)]
    inner = keras.Sequential([keras.Input((3,)), *layers])
    inner.compile(keras.optimizers.SGD(0.05), loss="mse")
    return PolyakModel(inner, average=rule or width(0.05), **options)


@pytest.fixture(scope="module")
def traced():
    """A model for tests that look at the steps of snapshots alone: tracing takes longer."""
    return make_model()


@pytest.fixture
def fresh(traced):
    """The same model, of which no step has been averaged."""
    traced.reset_average()
    return traced


def fit(model, folder, epochs=1, count=4, callbacks=(), batch_size=1, **options):
    snapshots = AverageSnapshots(folder, **{"count": count, **options})
    settings = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
    model.fit(X, Y, epochs=epochs, callbacks=[snapshots, *callbacks], **settings)


def list_steps(folder):
    return sorted(each.record.step for each in list_snapshots(folder))


def read(folder):
    """Returns all tensors of all snapshots, by file and name."""
    arrays = {}
    for each in list_snapshots(folder):
        with open_weights(each.path) as weights:
            for name, variable in weights.variables.items():
                if name != "record":
                    arrays[each.path.name, name] = variable.read()
    return arrays


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_snapshot_is_the_average_at_its_step(tmp_path):
    model = make_model()
    fit(model, tmp_path / "a")
    arrays = read(tmp_path / "a")
    name = "snapshot-0000000040.weights.h5"
    expected = [weight.numpy() for weight in model.average_model.weights]
    paths = [f"layers/dense{n}/vars/{i}" for n in ("", "_1") for i in (0, 1)]
    for path, array in zip(paths, expected, strict=True):
        np.testing.assert_array_equal(arrays[name, f"averages/average/{path}"], array)
    assert len({path for _, path in arrays}) == len(expected)


@pytest.mark.parametrize(("epochs", "expected"), [(1, range(8, 41, 8)), (2, range(16, 81, 16))])
def test_the_spacing_doubles_with_the_length_of_the_training(tmp_path, fresh, epochs, expected):
    fit(fresh, tmp_path / "a", epochs)
    assert list_steps(tmp_path / "a") == list(expected)


@pytest.mark.parametrize("last", [1, 2, 3, 4, 5, 7, 8, 9, 17])
def test_a_training_of_any_length_has_as_many_snapshots_and_one_at_its_end(tmp_path, fresh, last):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch + 1 == last

    fit(fresh, tmp_path / "a", count=2, callbacks=[Stop()])
    steps = list_steps(tmp_path / "a")
    assert steps[-1] == last
    assert min(last, 2) <= len(steps) <= 4


def test_the_training_may_end_early_before_any_lasting_snapshot(tmp_path, fresh):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 9

    fit(fresh, tmp_path / "a", epochs=100, callbacks=[Stop()])
    assert list_steps(tmp_path / "a") == [2, 4, 6, 8, 10]


def test_small_superfluous_snapshots_are_not_written(tmp_path, monkeypatch):
    written = []
    write = module.write_snapshot

    def count(path, *args):
        written.append(path.name)
        write(path, *args)

    monkeypatch.setattr(module, "write_snapshot", count)
    fit(make_model(), tmp_path / "a")
    assert len(written) == len(set(written)) == len(list_steps(tmp_path / "a"))
    # Large ones do not fit into memory.
    monkeypatch.setattr(module, "_MOST_PENDING", 0)
    fit(make_model(), tmp_path / "b")
    assert len(written) > 15
    assert_equal(read(tmp_path / "a"), read(tmp_path / "b"))


@pytest.mark.parametrize("added", [0, 40])
def test_averages_by_name_are_snapshotted_each_under_its_rule(tmp_path, added):
    rules = PowerAverage.pair()
    model = make_model({"short": rules["short"]})
    if added:
        # Another average is added to a training that has begun.
        fit(model, tmp_path / "before")
        model.save_weights(tmp_path / "short.weights.h5")
    model = make_model({"short": rules["short"], "long": rules["long"]})
    if added:
        model.load_weights(tmp_path / "short.weights.h5")
    fit(model, tmp_path / "a", epochs=2)
    late = PowerAverage.from_relative_width(0.20, start_step=added)
    assert read_run(tmp_path / "a").rules == {"short": rules["short"], "long": late}
    for name, average in model.average_models.items():
        rebuild(tmp_path / "a", read_run(tmp_path / "a").rules[name], tmp_path / "out.weights.h5")
        with h5py.File(tmp_path / "out.weights.h5") as file:
            kernel = file["layers/dense/vars/0"][()]
        np.testing.assert_allclose(kernel, average.weights[0].numpy(), rtol=1e-6)


def test_every_step_given_is_kept(tmp_path, fresh):
    fit(fresh, tmp_path / "a", every=7)
    assert list_steps(tmp_path / "a") == [7, 14, 21, 28, 35, 40]


def test_one_fit_leaves_what_several_fits_leave(tmp_path):
    fit(make_model(), tmp_path / "a", epochs=4)
    model = make_model()
    for _ in range(4):
        fit(model, tmp_path / "b")
    assert_equal(read(tmp_path / "a"), read(tmp_path / "b"))


def test_a_resumed_training_goes_on_in_the_same_folder(tmp_path):
    fit(make_model(), tmp_path / "a", epochs=4)
    model = make_model()
    fit(model, tmp_path / "b", epochs=2)
    model.save(tmp_path / "model.keras")
    fit(keras.models.load_model(tmp_path / "model.keras"), tmp_path / "b", epochs=2)
    assert_equal(read(tmp_path / "a"), read(tmp_path / "b"))


def test_a_training_that_goes_back_forgets_what_followed(tmp_path):
    model = make_model()
    fit(model, tmp_path / "a", every=10)
    model.save(tmp_path / "model.keras")
    fit(model, tmp_path / "a", epochs=2, every=10)
    assert list_steps(tmp_path / "a")[-1] == 120
    fit(keras.models.load_model(tmp_path / "model.keras"), tmp_path / "a", every=10)
    assert list_steps(tmp_path / "a") == list(range(10, 81, 10))
    assert read_run(tmp_path / "a").notes == []


def test_snapshots_of_another_training_are_neither_mixed_nor_removed(tmp_path):
    fit(make_model(), tmp_path / "a")
    before = read(tmp_path / "a")
    with pytest.raises(ValueError, match=r"in which 'snapshot-.* is of another one. Choose a new"):
        fit(make_model(), tmp_path / "a")
    assert_equal(read(tmp_path / "a"), before)


def test_files_of_the_user_stay(tmp_path):
    folder = tmp_path / "a"
    fit(make_model(), folder, every=10)
    copy = folder / "copy-of-snapshot-0000000010.weights.h5"
    shutil.copy(folder / "snapshot-0000000010.weights.h5", copy)
    (folder / "notes.txt").touch()
    model = make_model()
    model.shadow.run = list_snapshots(folder)[0].record.run
    fit(model, folder, epochs=3)
    assert copy.exists()
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("between", ["fits", "batches"])
def test_after_a_reset_only_what_follows_counts(tmp_path, between):
    class Reset(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if between == "batches" and batch == 9 and self.model.average_step > 80:
                self.model.reset_average()

    model = make_model(width(0.1))
    fit(model, tmp_path / "a", epochs=2)
    if between == "fits":
        model.reset_average()
    fit(model, tmp_path / "a", callbacks=[Reset()])
    assert model.average_step == (40 if between == "fits" else 30)
    run = read_run(tmp_path / "a")
    assert run.step == model.average_step
    assert {each.record.period for each in run.snapshots} == {1}
    assert "averaging was restarted after them" in run.notes[0]
    rebuilt = rebuild(tmp_path / "a", width(0.1), tmp_path / "out.weights.h5")
    assert rebuilt.step == model.average_step
    with h5py.File(tmp_path / "out.weights.h5") as file:
        kernel = file["layers/dense/vars/0"][()]
    np.testing.assert_allclose(kernel, model.average_model.weights[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("steps_per_execution", [1, 3, 8])
def test_steps_inside_one_execution_land_on_its_end(tmp_path, steps_per_execution):
    model = make_model()
    model.compile("sgd", loss="mse", steps_per_execution=steps_per_execution)
    fit(model, tmp_path / "a", every=8)
    ends = [*range(steps_per_execution, 40, steps_per_execution), 40]
    expected = {next(end for end in ends if end >= step) for step in range(8, 41, 8)}
    assert list_steps(tmp_path / "a") == sorted(expected)


def test_steps_of_the_optimizer_count_not_batches(tmp_path):
    model = make_model()
    model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=4), loss="mse")
    fit(model, tmp_path / "a", every=2)
    assert list_steps(tmp_path / "a") == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_averages_of_16_bits_are_stored_in_float32(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    model = make_model()
    fit(model, tmp_path / "a")
    run = read_run(tmp_path / "a")
    assert {*run.snapshots[-1].record.dtypes["average"].values()} == {policy}
    master = model.shadow.first.pairing.averaged[0].master
    arrays = read(tmp_path / "a")
    name = ("snapshot-0000000040.weights.h5", "averages/average/layers/dense/vars/0")
    assert arrays[name].dtype == "float32"
    np.testing.assert_array_equal(arrays[name], master.numpy())
    rebuild(tmp_path / "a", width(0.05), tmp_path / "out.weights.h5")
    with open_weights(tmp_path / "out.weights.h5") as weights:
        assert weights.variables["layers/dense/vars/0"].dtype == policy


def test_residuals_are_added_in_float64(tmp_path):
    model = make_model(ExponentialAverage(0.999), compensated=True)
    fit(model, tmp_path / "a")
    pair = model.shadow.first.pairing.averaged[0]
    expected = pair.average.numpy().astype("float64") + pair.residual.numpy()
    arrays = read(tmp_path / "a")
    name = ("snapshot-0000000040.weights.h5", "averages/average/layers/dense/vars/0")
    np.testing.assert_array_equal(arrays[name], expected)
    assert (expected != expected.astype("float32")).any()


def test_statistics_are_not_combined(tmp_path):
    model = make_model(layers=[keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    fit(model, tmp_path / "a")
    rebuilt = rebuild(tmp_path / "a", width(0.1), tmp_path / "out.weights.h5", max_error=1)
    assert rebuilt.statistics == ["layers/batch_normalization"]
    with h5py.File(tmp_path / "out.weights.h5") as file:
        variance = file["layers/batch_normalization/vars/3"][()]
    np.testing.assert_array_equal(variance, model.average_model.layers[0].moving_variance.numpy())


@pytest.mark.parametrize("kind", ["functional", "sequential", "nested"])
def test_models_of_any_kind_load_what_is_rebuilt(tmp_path, kind):
    model = make_wrapper(kind)
    model.compile("sgd", loss="mse")
    snapshots = AverageSnapshots(tmp_path / "a", count=2)
    model.fit(INPUTS, TARGETS, epochs=3, batch_size=4, callbacks=[snapshots], verbose=0)
    rebuild(tmp_path / "a", model.rule, tmp_path / "out.weights.h5")
    loaded = KINDS[kind]()
    loaded(INPUTS)
    loaded.load_weights(tmp_path / "out.weights.h5")
    expected = model.average_model.get_weights()
    for received, array in zip(loaded.get_weights(), expected, strict=True):
        np.testing.assert_allclose(received, array, rtol=1e-6, atol=1e-7)


def test_one_of_several_replicas_is_read(tmp_path, strategy):
    with strategy.scope():
        model = make_model(PowerAverage.pair())
    fit(model, tmp_path / "a", batch_size=2)
    arrays = read(tmp_path / "a")
    for name, average in model.average_models.items():
        path = ("snapshot-0000000020.weights.h5", f"averages/{name}/layers/dense/vars/0")
        np.testing.assert_array_equal(arrays[path], average.weights[0].numpy())


class SavesSquares(keras.layers.Layer):
    def build(self, input_shape):
        self.scale = self.add_weight(shape=(1,))

    def call(self, inputs):
        return inputs * self.scale

    def save_own_variables(self, store):
        store["scale"] = keras.ops.convert_to_numpy(self.scale) ** 2


def test_weights_that_a_layer_saves_in_another_form_are_refused(tmp_path):
    model = make_model(layers=[SavesSquares(), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="its layer saves in another form. Let its `save_own_var"):
        fit(model, tmp_path / "a")


def make_with_lora(quantize=False):
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    if quantize:
        inner.layers[0].quantize("int8")
    enable_lora_in(inner.layers[0], 1)
    inner.compile("sgd", loss="mse")
    return inner


@pytest.mark.parametrize("share_frozen", [False, True])
def test_factors_of_lora_are_rebuilt_and_merged(share_frozen, tmp_path):
    inner = make_with_lora()
    frozen = inner.layers[0].get_weights()[0]
    model = PolyakModel(inner, PowerAverage.pair(), share_frozen=share_frozen)
    fit(model, tmp_path / "a", every=5)
    like, archive = tmp_path / "like.keras", tmp_path / "rebuilt.keras"
    model.average_model.save(like)
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    for name, rule in model.rules.items():
        rebuild(tmp_path / "a", rule, archive, like=like)
        rebuild(tmp_path / "a", rule, tmp_path / "rebuilt.weights.h5")
        plain.load_weights(tmp_path / "rebuilt.weights.h5")
        expected = model.predict(X, using=name, verbose=0)
        for each in (plain, keras.models.load_model(archive, compile=False)):
            received = each.predict(X, verbose=0)
            np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)
            assert np.abs(each.layers[0].get_weights()[0] - frozen).max() > 1e-3


def test_lora_on_a_quantized_kernel_is_refused_before_the_first_step(tmp_path):
    model = PolyakModel(make_with_lora(quantize=True))
    with pytest.raises(ValueError, match="quantized weight '.*kernel'. Train without quantization"):
        fit(model, tmp_path / "a")


def test_other_models_and_counts_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")
    with pytest.raises(TypeError, match="Received: the fit of a Sequential. Wrap the model"):
        fit(model, tmp_path / "a")
    for options in ({"count": 0}, {"every": 0}, {"count": 1.5}):
        with pytest.raises(ValueError, match="must be an int of at least 1"):
            AverageSnapshots(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_a_rule_that_changes_on_the_way_is_refused(tmp_path):
    model = make_model()
    fit(model, tmp_path / "a")
    model.rule = width(0.2)
    fit(model, tmp_path / "a")
    with pytest.raises(InputError, match="the rules differ"):
        rebuild(tmp_path / "a", width(0.1))


@pytest.mark.parametrize("is_first", [True, False])
def test_restored_weights_leave_the_snapshots_as_they_are(tmp_path, is_first):
    class Restore(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.best = self.model.get_weights() if epoch == 0 else self.best

        def on_train_end(self, logs=None):
            self.model.set_weights(self.best)

    callbacks = [Restore(), AverageSnapshots(tmp_path / "a", every=30)]
    model = make_model()
    model.fit(X, Y, 1, epochs=3, verbose=0, callbacks=callbacks if is_first else callbacks[::-1])
    assert model.average_step == 40
    assert list_steps(tmp_path / "a") == [30, 60, 90, 120]


def holding(monkeypatch):
    """Returns an event without which no snapshot is written."""
    go_on, write = threading.Event(), module.write_snapshot

    def hold(*args):
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(module, "write_snapshot", hold)
    return go_on


def test_a_file_in_the_place_of_the_folder_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "a").touch()
    model = make_model()
    with pytest.raises(OSError, match=r"Cannot create the folder '.*a': a file has its name"):
        fit(model, tmp_path / "a")
    assert model.average_step == 0


def test_training_goes_on_while_a_snapshot_is_written(tmp_path, fresh, monkeypatch):
    go_on = holding(monkeypatch)

    class GoOn(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 14:
                assert not list_steps(tmp_path / "a")
                go_on.set()

    fit(fresh, tmp_path / "a", callbacks=[GoOn()])
    assert list_steps(tmp_path / "a") == list(range(8, 41, 8))


def test_a_saved_model_is_not_ahead_of_its_snapshots(tmp_path, fresh, monkeypatch):
    go_on, seen = holding(monkeypatch), []

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 9:
                threading.Timer(0.5, go_on.set).start()
                self.model.save_weights(tmp_path / "backup.weights.h5")
                seen.extend(list_steps(tmp_path / "a"))

    fit(fresh, tmp_path / "a", callbacks=[Save()])
    assert seen == [8]


def test_an_error_of_writing_a_snapshot_ends_the_training_and_nothing_is_lost(
    tmp_path, monkeypatch
):
    model = make_model()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_snapshot", Mock(side_effect=OSError(28, "No space left")))
        with pytest.raises(OSError, match=r"Cannot write .*snapshot-0{9}8.* Free space"):
            fit(model, tmp_path / "a")
    step = model.average_step
    assert 8 < step <= 16
    # The error was raised, and training goes on in the same folder.
    fit(model, tmp_path / "a")
    assert list_steps(tmp_path / "a")[-1] == step + 40
