import subprocess
import sys

import keras
import numpy as np
import pytest
from frameworks import BACKEND, compiled, gradients_of
from keras import layers
from models import CROSSENTROPY, LazyClassifier, compile_classifier, make_classifier, trained

from polyak_model import ExponentialAverage, PolyakModel, PowerAverage, UniformAverage

ROUTES = ("average", "raw", "ensemble")

# On JAX, a step cannot reach across devices.
DEVICE = None if BACKEND == "jax" else "CPU:0"


def assert_same_weights(one, other):
    assert len(one.weights) == len(other.weights) > 0
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Wrapping and compiling


def test_a_model_compiled_before_wrapping_fits_without_compiling_again(batches):
    model = PolyakModel(compile_classifier(make_classifier()))
    history = model.fit(*batches, verbose=0, validation_data=batches).history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}


def test_a_model_compiled_through_the_wrapper_is_compiled_itself(batches):
    model = compile_classifier(PolyakModel(make_classifier()))
    assert model.raw_model.optimizer is model.optimizer
    model.fit(*batches, verbose=0)
    assert len(model.raw_model.evaluate(*batches, verbose=0)) == 2


def test_a_raw_model_compiled_after_wrapping_is_noticed(batches):
    model = PolyakModel(make_classifier())
    compile_classifier(model.raw_model)
    model.fit(*batches, verbose=0)
    model.raw_model.compile(keras.optimizers.SGD(0.5), CROSSENTROPY)
    model.fit(*batches, verbose=0)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    logs = model.evaluate(*batches, verbose=0, return_dict=True)
    assert logs.keys() == model.raw_model.evaluate(*batches, verbose=0, return_dict=True).keys()


def test_the_average_model_can_be_evaluated_by_itself(batches):
    model = trained(batches)
    model.raw_model.layers[0].kernel.regularizer = None
    model.compile("adam", CROSSENTROPY, metrics=["accuracy"])
    average = model.average_model
    average.layers[0].kernel.regularizer = None
    assert average.evaluate(*batches, verbose=0) == model.evaluate(*batches, verbose=0)


def test_the_wrapper_is_built_by_an_input_shape():
    model = PolyakModel(LazyClassifier())
    model.build((None, 6))
    assert model.built
    assert_same_weights(model.raw_model, model.average_model)


class BuiltEarly(LazyClassifier):
    """A model that Keras calls built before it has weights."""

    def build(self, input_shape):
        self.built = True


def test_a_model_that_is_built_without_weights_is_started_by_its_first_batch(batches):
    inner = BuiltEarly()
    inner.build((None, 6))
    model = PolyakModel(compile_classifier(inner))
    model.fit(*batches, verbose=0)
    assert len(model.average_model.weights) == len(inner.weights) == 8
    assert model.average_step == 2


def test_weights_gained_after_wrapping_are_refused_by_name(batches):
    inner = make_classifier()
    model = PolyakModel(compile_classifier(inner))
    inner.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match="Received: 1.*lora_kernel_a.*then wrap the model"):
        model.fit(*batches, verbose=0)


def test_calls_train_the_raw_model_and_ask_the_route_otherwise(batches):
    model = trained(batches)
    x = batches[0]
    for route, expected in (("raw", model.raw_model), ("average", model.average_model)):
        model.inference = route
        outputs = (model(x, training=False), expected(x, training=False))
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, outputs))
    before = model.raw_model.layers[1].moving_mean.numpy()
    model(x, training=True)
    assert not np.array_equal(before, model.raw_model.layers[1].moving_mean.numpy())


# The average between and beside fits


def test_reset_forgets_the_past(batches):
    model = trained(batches, average=UniformAverage())
    model.reset_average()
    assert model.average_step == 0
    assert_same_weights(model.raw_model, model.average_model)
    model.fit(*batches, batch_size=64, verbose=0)
    assert model.average_step == 1
    assert_same_weights(model.raw_model, model.average_model)


def test_apply_copies_the_average_into_the_raw_model(batches):
    model = trained(batches)
    average = model.average_model.get_weights()
    model.apply_average()
    assert_same_weights(model.raw_model, model.average_model)
    np.testing.assert_array_equal(model.raw_model.get_weights()[0], average[0])
    assert model.average_step == 16


def test_a_training_loop_of_ones_own_updates_inside_a_function(batches, mode):
    model = PolyakModel(make_classifier(), UniformAverage())
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.raw_model.trainable_variables)
    x, y = map(keras.ops.convert_to_tensor, batches)

    def step():
        def loss():
            outputs = model(x, training=True)
            return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, outputs))

        weights = model.raw_model.trainable_variables
        optimizer.apply_gradients(zip(gradients_of(loss, model), weights, strict=True))
        model.update_average()

    step = compiled(step, [*model.variables, *optimizer.variables], **mode)
    kernels = []
    for _ in range(5):
        step()
        kernels.append(model.raw_model.weights[0].numpy().astype("float64"))
    assert model.average_step == 5
    np.testing.assert_allclose(
        model.average_model.weights[0].numpy(), np.mean(kernels, axis=0), rtol=0, atol=2e-7
    )


def test_statistics_are_averaged_or_copied(batches):
    averaged, copied = trained(batches), trained(batches, non_trainable="copy")
    norm = averaged.average_model.layers[1], averaged.raw_model.layers[1]
    assert not np.array_equal(norm[0].moving_mean, norm[1].moving_mean)
    norm = copied.average_model.layers[1], copied.raw_model.layers[1]
    np.testing.assert_array_equal(norm[0].moving_mean, norm[1].moving_mean)
    np.testing.assert_array_equal(norm[0].moving_variance, norm[1].moving_variance)
    assert not np.array_equal(norm[0].gamma, norm[1].gamma)


def test_a_frozen_weight_is_averaged_once_it_is_unfrozen_even_where_statistics_are_copied(batches):
    inner = make_classifier()
    inner.layers[0].trainable = False
    model = PolyakModel(inner, non_trainable="copy")
    inner.layers[0].trainable = True
    compile_classifier(model)
    model.fit(*batches, batch_size=4, verbose=0)
    assert not np.array_equal(inner.get_weights()[0], model.average_model.get_weights()[0])


def test_a_checkpoint_may_monitor_another_route(batches, tmp_path):
    path = tmp_path / "best.keras"
    model = PolyakModel(compile_classifier(make_classifier()), report=ROUTES)
    best = keras.callbacks.ModelCheckpoint(
        path, monitor="val_raw_loss", mode="min", save_best_only=True
    )
    history = model.fit(
        *batches, epochs=2, verbose=0, validation_data=batches, callbacks=[best]
    ).history
    assert {"val_loss", "val_raw_loss", "val_ensemble_accuracy"} <= set(history)
    loaded = keras.models.load_model(path)
    assert loaded.evaluate(*batches, verbose=0, using="raw")[0] == pytest.approx(
        min(history["val_raw_loss"]), rel=1e-6
    )


# Saving


SAVED = {
    "decay": {"average": 0.9},
    "rule": {"average": PowerAverage(3, start_step=2, update_every=3), "non_trainable": "copy"},
    "compensated": {"average": UniformAverage(), "compensated": True, "report": ROUTES},
    "ensemble": {"average": 0.5, "inference": "ensemble", "combine": "mean", "device": DEVICE},
}


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (make_classifier, "decay"),
        (LazyClassifier, "rule"),
        (make_classifier, "compensated"),
        (LazyClassifier, "ensemble"),
    ],
)
def test_a_saved_wrapper_loads_and_continues_as_if_it_had_never_stopped(
    make, arguments, batches, tmp_path
):
    model = PolyakModel(compile_classifier(make(), run_eagerly=True), **SAVED[arguments])
    model.fit(*batches, batch_size=16, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.average_step == 4
    assert loaded.shadow.first.rule == model.shadow.first.rule
    assert_same_weights(model, loaded)
    for each in (model, loaded):
        each.fit(*batches, batch_size=16, verbose=0, shuffle=False)
    assert_same_weights(model, loaded)
    assert model.evaluate(*batches, verbose=0) == loaded.evaluate(*batches, verbose=0)


def test_loading_without_compiling_leaves_the_losses_alone(batches, tmp_path):
    def loss_of_ones_own(y, p):
        return keras.losses.sparse_categorical_crossentropy(y, p)

    inner = make_classifier()
    inner.compile("sgd", loss_of_ones_own)
    model = PolyakModel(inner)
    model.fit(*batches, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert not loaded.compiled
    assert_same_weights(model.average_model, loaded.average_model)


def test_the_saved_average_is_a_plain_model_that_can_be_trained_further(batches, tmp_path):
    model = trained(batches)
    model.average_model.save(tmp_path / "average.keras")
    loaded = keras.models.load_model(tmp_path / "average.keras")
    assert type(loaded) is keras.Sequential
    assert len(loaded.trainable_weights) == 6
    assert loaded.evaluate(*batches, verbose=0) == model.evaluate(*batches, verbose=0)


@pytest.mark.processes
def test_the_saved_average_loads_where_this_package_cannot_be_imported(batches, tmp_path):
    model = trained(batches)
    model.average_model.save(tmp_path / "average.keras")
    np.save(tmp_path / "x.npy", batches[0])
    script = """
import sys
sys.modules["polyak_model"] = None
import keras, numpy as np
model = keras.models.load_model("average.keras")
np.save("predicted.npy", model.predict(np.load("x.npy"), verbose=0))
try:
    import polyak_model
except ImportError:
    print("not importable")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("not importable")
    np.testing.assert_allclose(
        np.load(tmp_path / "predicted.npy"), model.predict(batches[0], verbose=0), rtol=1e-6
    )


@keras.saving.register_keras_serializable(package="tests")
def last(outputs):
    return outputs[-1]


@keras.saving.register_keras_serializable(package="tests")
def make_small():
    return keras.Sequential([keras.Input((2,)), layers.Dense(1)])


@pytest.mark.parametrize("steps", [10, 1_000, 100_000])
def test_the_default_average_remembers_the_same_fraction_of_every_run(steps):
    # A decay of 0.999 would average all of a short run, and the last 1 % of a long one.
    rule = PolyakModel(make_small()).rule
    assert rule == PowerAverage.from_relative_width(0.15)
    assert rule.mean_age(steps) == pytest.approx(0.18 * steps, rel=0.02, abs=0.5)


def test_a_file_keeps_its_rule_whatever_the_default(tmp_path):
    PolyakModel(make_small(), 0.999).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.rule == ExponentialAverage(0.999)


def test_every_constructor_argument_goes_through_the_config():
    arguments = {
        "average": ExponentialAverage(0.5, debias=False),
        "inference": "ensemble",
        "report": ("raw", "average"),
        "combine": last,
        "non_trainable": "copy",
        "exclude": r".*/bias",
        "compensated": True,
        "device": DEVICE,
        "clone_function": make_small,
        "name": "wrapped",
    }
    model = PolyakModel(make_small(), **arguments)
    config = model.get_config()
    assert set(config) == {"format", "model", *arguments}
    loaded = PolyakModel.from_config(config)
    assert loaded.get_config() == config
    assert loaded.shadow.first.rule == arguments["average"]
    assert loaded.clone_function is make_small
    assert (loaded.name, loaded.inference, loaded.report) == (
        "wrapped",
        "ensemble",
        ("raw", "average"),
    )
    np.testing.assert_array_equal(loaded(np.ones((1, 2))), loaded.average_model(np.ones((1, 2))))


# Bad input


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("average", 1.0, "`decay` must be a number in"),
        ("inference", "mean", "`inference` must be one of 'average', 'raw', 'ensemble'"),
        ("report", ("raw", "ema"), "`report` must be one of .* Received: report='ema'"),
        ("report", "raw", r"write report=\('raw',\)"),
        ("combine", "median", "`combine` must be 'mean', 'softmax' or a callable"),
        ("non_trainable", "skip", "`non_trainable` must be one of 'average', 'copy'"),
    ],
)
def test_an_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(ValueError, match=message):
        PolyakModel(make_small(), **{argument: value})


def test_an_unknown_route_is_refused_wherever_it_is_named(batches):
    model = trained(batches)
    x, y = batches
    for call in (
        lambda: model.predict(x, using="best"),
        lambda: model.evaluate(x, y, using="best"),
        lambda: model.predict_on_batch(x, using="best"),
        lambda: model.test_on_batch(x, y, using="best"),
    ):
        with pytest.raises(ValueError, match="`using` must be one of.*Received: using='best'"):
            call()
    with pytest.raises(ValueError, match="`inference` must be one of"):
        model.inference = "best"
    assert model.inference == "average"


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_training_before_compiling_is_refused(method, batches):
    model = PolyakModel(make_classifier())
    with pytest.raises(ValueError, match=rf"`{method}\(\)` needs a compiled model.*model.compile"):
        getattr(model, method)(*batches)


@pytest.mark.parametrize("method", ["update_average", "reset_average", "apply_average"])
def test_averaging_before_building_is_refused(method):
    model = PolyakModel(LazyClassifier())
    with pytest.raises(ValueError, match=rf"`{method}\(\)` needs weights.*model.build"):
        getattr(model, method)()


def test_a_metric_needs_no_config_to_be_reported_by_every_route(batches):
    class Scaled(keras.metrics.MeanMetricWrapper):
        def __init__(self, scale):
            super().__init__(lambda y, outputs: scale * keras.ops.max(outputs, axis=-1), "scaled")

    model = PolyakModel(make_classifier(), 0.5, report=("average", "raw", "ensemble"))
    model.compile("sgd", CROSSENTROPY, metrics=[Scaled(2)])
    model.fit(*batches, batch_size=4, verbose=0)
    logs = model.evaluate(*batches, verbose=0, return_dict=True)
    for route, prefix in (("average", ""), ("raw", "raw_"), ("ensemble", "ensemble_")):
        outputs = model.predict(batches[0], using=route, verbose=0)
        assert logs[f"{prefix}scaled"] == pytest.approx(2 * outputs.max(-1).mean(), rel=1e-5)


def test_a_metric_that_cannot_be_copied_is_refused_before_anything_changes():
    class Handle:
        def __reduce_ex__(self, protocol):
            raise TypeError("it belongs to this process")

    class Opaque(keras.metrics.Mean):
        def __init__(self):
            super().__init__(name="opaque")
            self.stream = Handle()

    model = PolyakModel(make_classifier())
    with pytest.raises(ValueError, match="`stream` of .*Handle, which cannot be copied"):
        model.compile("sgd", CROSSENTROPY, metrics=[Opaque()])
    assert not model.raw_model.compiled


def test_the_state_tree_of_a_wrapper_contains_all_variables_and_restores_them(batches):
    model = trained(batches, {"short": 0.9, "long": 0.99}, compensated=True)
    state = model.get_state_tree("numpy_array")
    arrays = keras.tree.flatten(state)
    variables = model.variables + model.optimizer.variables + model.metrics_variables
    assert len(arrays) == len({id(variable) for variable in variables})
    before, step = model.get_weights(), model.average_step
    model.fit(*batches, verbose=0)
    model.set_state_tree(state)
    assert model.average_step == step
    for expected, received in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(received, expected)


def test_averages_of_two_parts_of_one_model_have_paths_of_their_own():
    parts = [PolyakModel(make_classifier(seed)) for seed in (1, 2)]
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.add([part(inputs) for part in parts]))
    paths = [variable.path for variable in model.variables]
    averages = [w.path for part in parts for w in part.average_model.weights]
    assert len(set(averages)) == len(averages)
    assert not {w.path for part in parts for w in part.raw_model.weights} & set(averages)
    assert set(averages) <= set(paths)
