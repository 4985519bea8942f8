"""Small averages are one array between the steps of a training on JAX."""

import jax
import keras
import numpy as np
import pytest
from frameworks import BACKEND
from models import (
    assert_identical,
    compile_classifier,
    make_compiled,
    make_net_of_every_size,
)

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage

if BACKEND == "jax":
    from polyak_model.backend.jax import open_packs, packing

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")
OPTIONS = {
    "plain": {},
    "three averages": {"average": {"short": 0.5, "long": 0.9, "uniform": UniformAverage()}},
    "compensated": {"compensated": True},
    "at every third step": {"average": ExponentialAverage(0.5, start_step=2, update_every=3)},
    "some copied": {"non_trainable": "copy", "exclude": ".*dense.*bias"},
}


class Watcher(keras.callbacks.Callback):
    """Records the state that Keras holds between steps, and what else a function returns."""

    def __init__(self, wrapper, look=lambda: None):
        super().__init__()
        self.wrapper, self.look = wrapper, look
        self.packed, self.seen = [], []

    def on_train_batch_end(self, batch, logs=None):
        # `self.model` would write the state to the variables.
        state = self.wrapper._jax_state["non_trainable_variables"]
        self.packed.append(isinstance(state, packing.Packed) and len(state.arrays))
        self.seen.append(self.look())


def fit(model, batches, look=lambda: None, **settings):
    """Trains for two epochs of four batches and returns the `Watcher`."""
    watcher = Watcher(model, look)
    settings = {"batch_size": 16, "epochs": 2, "verbose": 0} | settings
    model.fit(*batches, callbacks=[watcher], **settings)
    return watcher


def fit_packed_and_not(monkeypatch, make, train):
    """Trains two equal models, packs averages of the first alone, and returns both."""
    models = []
    for few in (2, 1_000):
        with monkeypatch.context() as patch:
            patch.setattr(packing, "FEW", few)
            keras.utils.set_random_seed(0)
            model = make()
            train(model)
        models.append(model)
    return models


def weights_of(model):
    """Returns all weights and the state of all averages."""
    return [np.array(variable) for variable in model.variables]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_training_with_packed_averages_is_the_same_bit_for_bit(options, batches, monkeypatch):
    packed = []

    def make():
        return PolyakModel(make_compiled(), **options)

    def train(model):
        packed.append(fit(model, batches).packed)

    one, other = fit_packed_and_not(monkeypatch, make, train)
    assert all(packed[0])
    assert not any(packed[1])
    assert_identical(weights_of(other), weights_of(one))


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2e38),
    ],
    ids=["accumulated", "scaled"],
)
def test_averages_that_rest_at_some_batches_are_packed_too(make_optimizer, batches, monkeypatch):
    def make():
        return PolyakModel(make_compiled(make_optimizer()), {"short": 0.5, "long": 0.9})

    one, other = fit_packed_and_not(monkeypatch, make, lambda model: fit(model, batches))
    assert_identical(weights_of(other), weights_of(one))
    assert 0 < one.average_step < 8


def test_master_copies_are_packed(batches, monkeypatch):
    def make():
        keras.config.set_dtype_policy("bfloat16")
        return PolyakModel(make_compiled())

    one, other = fit_packed_and_not(monkeypatch, make, lambda model: fit(model, batches))
    assert_identical(weights_of(other), weights_of(one))


def test_large_weights_are_not_packed_nor_few(batches):
    model = PolyakModel(make_net_of_every_size())
    model.compile("sgd", "mse")
    x = np.ones((16, 1), "float32")
    watcher = Watcher(model)
    model.fit(x, np.ones((16, 500)), callbacks=[watcher], verbose=0)
    (pack,) = model.train_function._packs
    assert watcher.packed == [1]
    assert len(pack.positions) == 68  # All but the last two of 70 weights.
    assert not any(fit(PolyakModel(make_compiled()), batches).packed)


def test_what_callbacks_read_in_an_epoch_is_current(batches, monkeypatch):
    seen = []

    def train(model):
        look = lambda: (model.average_step, model.average_model.get_weights())  # noqa: E731
        seen.append(fit(model, batches, look).seen)

    fit_packed_and_not(monkeypatch, lambda: PolyakModel(make_compiled()), train)
    for (step, weights), (expected_step, expected) in zip(*seen, strict=True):
        assert step == expected_step
        assert_identical(expected, weights)


@pytest.mark.parametrize("change", ["reset_average", "apply_average", "double"])
def test_what_callbacks_change_in_an_epoch_is_averaged_on(change, batches, monkeypatch):
    def train(model):
        def look():
            if model.average_step == 3:
                if change == "double":
                    average = model.average_model
                    average.set_weights([2 * w for w in average.get_weights()])
                else:
                    getattr(model, change)()

        fit(model, batches, look)

    one, other = fit_packed_and_not(monkeypatch, lambda: PolyakModel(make_compiled()), train)
    assert_identical(weights_of(other), weights_of(one))


def test_weights_that_are_frozen_between_trainings_stay_where_they_are(batches, monkeypatch):
    def train(model):
        fit(model, batches)
        model.raw_model.layers[0].trainable = False
        compile_classifier(model)
        fit(model, batches)

    one, other = fit_packed_and_not(monkeypatch, lambda: PolyakModel(make_compiled()), train)
    assert_identical(weights_of(other), weights_of(one))


def test_several_steps_per_execution_pass_packs_on(batches, monkeypatch):
    def make():
        return PolyakModel(make_compiled(steps_per_execution=2))

    one, other = fit_packed_and_not(monkeypatch, make, lambda model: fit(model, batches))
    assert_identical(weights_of(other), weights_of(one))
    assert one.average_step == 8


def test_single_batches_are_trained_without_packing(batches, monkeypatch):
    monkeypatch.setattr(packing, "FEW", 2)
    model, found = PolyakModel(make_compiled()), []
    monkeypatch.setattr(packing.PackingTrainFunction, "_find", lambda *_: found.append(True))
    model.train_on_batch(*batches)
    assert model.average_step == 1
    assert not found
    fit(model, batches)
    assert found


def test_averages_are_kept_if_the_first_step_fails(batches, monkeypatch):
    monkeypatch.setattr(packing, "FEW", 2)
    model = PolyakModel(make_compiled())
    fit(model, batches)
    before = weights_of(model)
    x, y = batches
    with pytest.raises(ValueError, match="incompatible with the layer"):
        model.fit(x[:, :5], y, verbose=0)
    assert_identical(before, weights_of(model))


def test_arrays_that_were_packed_are_freed(batches, monkeypatch):
    monkeypatch.setattr(packing, "FEW", 2)
    model = PolyakModel(make_compiled())
    fit(model, batches)
    arrays = [weight.value for weight in model.average_model.weights]
    freed = fit(model, batches, lambda: all(array.is_deleted() for array in arrays)).seen
    assert all(freed)


def test_a_part_that_a_step_assigns_by_itself_is_joined_anew():
    pack = packing.Pack((0, 1), ((2,), ()))
    variables = [keras.Variable(np.zeros(shape, "float32")) for shape in pack.shapes]
    opened = open_packs.OpenPack(pack, variables)
    array = jax.numpy.arange(3.0)
    opened.assign(array)
    assert opened.value is array
    variables[1].assign(5.0)
    np.testing.assert_array_equal(opened.value, [0, 1, 5])
