import closed_forms
import keras
import numpy as np
import pytest
from frameworks import compiled
from models import LazyClassifier, make_classifier

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage


def make_walker(rule, **kwargs):
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    return PolyakModel(inner, rule, **kwargs)


def walk(model, values):
    for value in values:
        model.raw_model.set_weights([np.full((2, 1), value, "float32")])
        model.update_average()


def read(model):
    return float(model.shadow.first.model.get_weights()[0][0, 0])


def test_an_average_that_is_not_due_stays():
    model = make_walker(UniformAverage(update_every=3))
    start = read(model)
    walk(model, [1, 2])
    assert read(model) == start
    walk(model, [3])
    assert read(model) == 3


def test_a_rule_of_ones_own_is_asked_when_the_average_moves():
    class AtEvenSteps(UniformAverage):
        def moves_at(self, step):
            return step % 2 == 0

    model = make_walker(AtEvenSteps())
    model.raw_model.set_weights([np.full((2, 1), 5, "float32")])
    model.reset_average()
    walk(model, [1])
    assert read(model) == 5
    walk(model, [3])
    assert read(model) == 4


def test_the_average_mirrors_bit_for_bit_until_the_start_step():
    model = make_walker(UniformAverage(start_step=4))
    for value in (1e-8, 1e8, np.float32(0.1), -7):
        walk(model, [value])
        assert read(model) == np.float32(value)


def test_a_step_that_was_not_taken_leaves_average_and_count():
    for rule in (UniformAverage(), UniformAverage(update_every=2)):
        model = make_walker(rule)
        walk(model, [1, 2])
        before = read(model)
        model.raw_model.set_weights([np.full((2, 1), 9, "float32")])
        model.shadow.update(stepped=False)
        model.shadow.update(stepped=keras.ops.convert_to_tensor(False), may_skip=True)
        assert read(model) == before
        assert model.average_step == 2


def test_a_step_that_makes_the_weights_infinite_but_is_not_taken_leaves_the_average():
    model = make_walker(UniformAverage(update_every=2))
    walk(model, [1, 2])
    model.raw_model.set_weights([np.full((2, 1), np.inf, "float32")])
    model.shadow.update(stepped=False, may_skip=True)
    assert read(model) == 2


def test_compensation_keeps_a_slow_average_from_stalling():
    def gap(compensated):
        model = make_walker(ExponentialAverage(0.9999, debias=False), compensated=compensated)
        model.raw_model.set_weights([np.ones((2, 1), "float32")])
        model.reset_average()
        model.raw_model.set_weights([np.full((2, 1), 1.001, "float32")])
        update = compiled(lambda: [model.update_average() for _ in range(20)], model.variables)
        for _ in range(1500):
            update()
        expected = 1.001 - 0.001 * 0.9999**30_000
        return abs(read(model) - expected)

    assert gap(compensated=True) < 1.2e-7
    assert gap(compensated=False) > 1e-4


def test_reset_forgets_the_residuals():
    model = make_walker(UniformAverage(), compensated=True)
    walk(model, [0.1, 0.2, 0.7])
    assert any(
        np.any(weight.numpy()) for weight in model.shadow.weights if "residual" in weight.name
    )
    model.reset_average()
    residuals = [weight for weight in model.shadow.weights if "residual" in weight.name]
    assert len(residuals) == 1
    assert not residuals[0].numpy().any()


def test_a_shadow_starts_only_with_a_model_of_its_architecture():
    model = PolyakModel(LazyClassifier())
    other = make_classifier()
    with pytest.raises(ValueError, match="must have the architecture"):
        model.shadow.start(other)
    assert not model.shadow.started


@pytest.mark.parametrize(("policy", "precision"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
@pytest.mark.parametrize(
    ("rule", "compensated"),
    [
        (ExponentialAverage(0.999, debias=False), False),
        (ExponentialAverage(0.999), True),
        (UniformAverage(), False),
    ],
)
def test_the_average_of_16_bit_weights_is_right_to_half_a_rounding(
    rule, policy, precision, compensated
):
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype=policy)])
    model = PolyakModel(inner, rule, compensated=compensated)
    update = compiled(model.update_average, model.variables)
    generator = np.random.default_rng(0)
    start, iterates = inner.get_weights(), []
    for _ in range(300):
        inner.set_weights([generator.normal(1, 0.1, w.shape) for w in inner.get_weights()])
        iterates.append(inner.get_weights())
        update()
    expected = closed_forms.average(rule, start, iterates)
    for average, received in zip(expected, model.average_model.get_weights(), strict=True):
        assert received.dtype.name == policy
        error = np.abs(received.astype("float64") - average)
        assert np.all(error <= precision * np.abs(average) * 1.01 + 1e-7)


def test_16_bit_weights_are_mirrored_bit_for_bit_until_averaging_begins():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype="bfloat16")])
    model = PolyakModel(inner, ExponentialAverage(0.999, debias=False))
    inner.set_weights([np.full(w.shape, 1 / 3) for w in inner.get_weights()])
    for average, w in zip(model.average_model.get_weights(), inner.get_weights(), strict=True):
        np.testing.assert_array_equal(average, w)
    model.update_average()
    for average, w in zip(model.average_model.get_weights(), inner.get_weights(), strict=True):
        np.testing.assert_array_equal(average, w)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_entry_that_is_not_finite_leaves_its_entry_of_the_average(bad, policy, compensated):
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype=policy)])
    model = PolyakModel(inner, UniformAverage(), compensated=compensated)
    for kernel in (1.0, 2.0, bad, bad, 8.0):
        inner.set_weights([np.array([[kernel, 4]] * 3), np.array([kernel, 4])])
        model.update_average()
    # The two bad steps count, as if the average itself had been the iterate.
    expected = 1.5 + (8 - 1.5) / 5
    kernel, bias = (w.astype("float32") for w in model.average_model.get_weights())
    np.testing.assert_allclose(kernel, [[expected, 4]] * 3, rtol=2.0**-8)
    np.testing.assert_allclose(bias, [expected, 4], rtol=2.0**-8)
    assert model.average_step == 5


@pytest.mark.parametrize(
    ("non_trainable", "mode"),
    [("average", "eager"), ("average", "graph"), ("copy", "eager"), ("copy", "xla")],
    indirect=["mode"],
)
def test_training_that_ends_in_numbers_that_are_not_keeps_the_last_finite_average(
    non_trainable, batches, mode
):
    x, y = batches[0], batches[1].astype("float32")
    inner = make_classifier()
    model = PolyakModel(inner, UniformAverage(), non_trainable=non_trainable)
    model.compile("sgd", lambda y, p: keras.ops.mean((y[:, None] - p) ** 2), **mode)
    model.fit(x, y, batch_size=8, verbose=0)
    finite = model.average_model.get_weights()
    model.fit(x, y * np.nan, batch_size=8, epochs=2, verbose=0)
    assert np.isnan(inner.get_weights()[0]).any()
    after = model.average_model.get_weights()
    assert all(np.isfinite(w).all() for w in after)
    assert np.isfinite(model.predict(x, verbose=0)).all()
    # The statistics see finite activations once more, before the weights spoil those.
    for i in set(range(len(after))) - {4, 5}:
        np.testing.assert_array_equal(finite[i], after[i])
