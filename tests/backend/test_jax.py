"""What is particular to JAX: functions of the state, compiled once for equal functions."""

import importlib.util

import keras
import numpy as np
import pytest
from closed_forms import average
from frameworks import BACKEND
from models import (
    CROSSENTROPY,
    assert_close,
    assert_identical,
    compile_classifier,
    make_classifier,
    trained,
)

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")


def values(variables):
    return [variable.value for variable in variables]


def test_a_device_of_its_own_for_the_average_is_refused():
    with pytest.raises(ValueError, match="`device` must be None on JAX.*use keras.distribution"):
        PolyakModel(make_classifier(), device="cpu:0")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_rule_set_between_fits_acts_although_equal_methods_share_a_trace(run_eagerly, batches):
    inner = compile_classifier(make_classifier(), run_eagerly=run_eagerly)
    model = PolyakModel(inner, ExponentialAverage(0.9))
    model.fit(*batches, batch_size=16, verbose=0)
    model.rule = ExponentialAverage(0.0)
    model.fit(*batches, batch_size=16, verbose=0)
    assert_identical(inner.get_weights(), model.average_model.get_weights())


def test_an_evaluation_after_compiling_again_has_the_new_loss(batches):
    model = PolyakModel(compile_classifier(make_classifier()))
    for loss in (CROSSENTROPY, keras.losses.SparseCategoricalCrossentropy(ignore_class=0)):
        model.compile("sgd", loss)
        received, _ = model.evaluate(*batches, verbose=0)
        bare = compile_classifier(make_classifier())
        bare.compile("sgd", loss)
        expected, _ = bare.evaluate(*batches, verbose=0)
        assert received == pytest.approx(expected, rel=1e-6)


def test_no_two_variables_hold_one_array_since_a_step_donates_its_arrays(batches):
    model = trained(batches, compensated=True)
    for change in (model.reset_average, model.apply_average, model.update_average):
        change()
        model.fit(*batches, batch_size=32, verbose=0)
        arrays = values([*model.variables, *model.optimizer.variables])
        assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


def test_weights_and_averages_are_current_in_the_middle_of_an_epoch(batches):
    found = []

    class Reader(keras.callbacks.Callback):
        # `self.model` would write the state to the variables by itself.
        def on_train_batch_end(self, batch, logs=None):
            found.append((model.average_step, model.average_model.get_weights()))
            iterates.append(model.raw_model.get_weights())

    model, iterates = PolyakModel(compile_classifier(make_classifier()), UniformAverage()), []
    start = model.raw_model.get_weights()
    model.fit(*batches, batch_size=16, verbose=0, callbacks=[Reader()])
    assert [step for step, _ in found] == [1, 2, 3, 4]
    for step, received in found:
        assert_close(average(model.rule, start, iterates[:step]), received, ulps=4)


@pytest.mark.parametrize("compensated", [False, True])
def test_a_stateless_loop_averages_as_fit_does(compensated, batches):
    import jax

    def make():
        inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, activation="softmax")])
        keras.utils.set_random_seed(2)
        inner.set_weights([np.random.normal(size=w.shape) for w in inner.get_weights()])
        compile_classifier(inner, keras.optimizers.SGD(0.1))
        return PolyakModel(inner, UniformAverage(), compensated=compensated)

    fitted, model = make(), make()
    fitted.fit(*batches, batch_size=16, shuffle=False, verbose=0)
    model.optimizer.build(model.trainable_variables)

    def loss_of(trainable, state, x, y):
        outputs, _ = model.raw_model.stateless_call(trainable, (), x, training=True)
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, outputs))

    @jax.jit
    def step(trainable, state, optimizer, x, y):
        gradients = jax.grad(loss_of)(trainable, state, x, y)
        trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
        return trainable, model.stateless_update_average(trainable, state), optimizer

    groups = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
    state = tuple(map(values, groups))
    for start in range(0, 64, 16):
        state = step(*state, *(array[start : start + 16] for array in batches))
    for group, changed in zip(groups, state, strict=True):
        for variable, value in zip(group, changed, strict=True):
            variable.assign(value)
    assert model.average_step == 4
    assert_close(fitted.average_model.get_weights(), model.average_model.get_weights(), ulps=4)


@pytest.mark.parametrize(
    ("format", "named"),
    [
        ("tf_saved_model", "requires the tensorflow module"),
        ("onnx", "requires the jax2onnx module"),
        ("litert", "requires TensorFlow or PyTorch backend"),
        ("torch", "requires PyTorch backend"),
    ],
)
def test_an_export_that_needs_another_package_is_refused_by_name(format, named, tmp_path):
    if any(map(importlib.util.find_spec, ("tensorflow", "jax2onnx"))):
        pytest.skip("The package is installed.")
    model = PolyakModel(make_classifier())
    with pytest.raises((ImportError, ValueError), match=named):
        model.export(tmp_path / "artifact", format=format, verbose=False)
    assert not any(tmp_path.iterdir())


def test_a_model_built_by_its_first_training_step_is_refused(batches):
    class Parts(keras.Model):
        def train_step(self, state, data):
            raise NotImplementedError

    model = PolyakModel(Parts())
    model.compile("sgd")
    with pytest.raises(ValueError, match="Build its parts first"):
        model.fit(*batches, verbose=0)
