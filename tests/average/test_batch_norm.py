"""Statistics of BatchNormalization, measured against two passes of NumPy in float64."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers
from models import assert_close, assert_identical, compile_classifier, make_classifier, trained

from polyak_model import PolyakModel, UniformAverage, backend
from polyak_model.average.batch_norm import Pool, moments, refresh_statistics

OF_TENSORFLOW = pytest.mark.tensorflow


def draw(*shape, seed=0):
    """Draws numbers whose mean is far from 0, where careless formulas lose digits."""
    return (30 + np.random.default_rng(seed).normal(size=shape)).astype("float32")


def wide(array):
    """Returns float64, in which the oracles compute."""
    return keras.ops.convert_to_numpy(array).astype("float64")


def norms(model):
    """Returns moving means and variances of all layers, in order."""
    found = [layer for layer in model._flatten_layers() if hasattr(layer, "moving_mean")]
    return [s.numpy() for layer in found for s in (layer.moving_mean, layer.moving_variance)]


def refreshed(model, data, **kwargs):
    """Refreshes a model and returns its statistics."""
    refresh_statistics(model, data, verbose=0, **kwargs)
    return norms(model)


def make_two_in_sequence():
    """Makes a net with one BatchNormalization behind another."""
    first, second = layers.BatchNormalization(), layers.BatchNormalization()
    dense = [layers.Dense(n, activation="relu") for n in (5, 4)]
    return keras.Sequential([keras.Input((6,)), dense[0], first, dense[1], second])


def two_pass_oracle(model, batches):
    """Computes in float64 what both layers of `make_two_in_sequence` are given, batch by batch."""
    given = [[], []]
    for x in batches:
        for i in (0, 1):
            dense, norm = model.layers[2 * i : 2 * i + 2]
            x = np.maximum(wide(x) @ wide(dense.kernel) + wide(dense.bias), 0)
            given[i].append(x)
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + norm.epsilon)
            x = x * wide(norm.gamma) + wide(norm.beta)
    pooled = [np.concatenate(each) for each in given]
    return [statistic for each in pooled for statistic in (each.mean(0), each.var(0))]


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_uneven_batches_are_pooled_and_earlier_layers_normalize_by_batch(
    run_eagerly,
):
    model = make_two_in_sequence()
    model.compile(loss="mse", run_eagerly=run_eagerly)
    x = draw(20, 6) - 30
    oracle = two_pass_oracle(model, [x[:7], x[7:14], x[14:]])
    assert_close(oracle, refreshed(model, x, batch_size=7), ulps=16)


def test_with_all_data_in_one_batch_each_layer_is_measured_as_it_will_be_used():
    model, x = make_two_in_sequence(), draw(20, 6) - 30
    received = refreshed(model, x, batch_size=20)
    inner = keras.Sequential(model.layers[:3])
    given = wide(inner(x, training=False))
    assert_close([given.mean(0), given.var(0)], received[2:], ulps=16)


def make_nested():
    inner = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    return keras.Sequential([keras.Input((3,)), keras.Sequential([keras.Input((3,)), inner])])


class OwnNormalization(layers.BatchNormalization):
    """A subclass whose call takes no mask."""

    def call(self, inputs, training=None):
        return super().call(inputs, training=training)


KINDS = {
    "nested": make_nested,
    "bare of scale and centre": lambda: layers.BatchNormalization(center=False, scale=False),
    "subclass": OwnNormalization,
    "mixed precision": lambda: layers.BatchNormalization(dtype="mixed_float16"),
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=OF_TENSORFLOW if name == "synchronized" else ())
        for name, make in KINDS.items()
    ],
)
def test_every_kind_of_layer_is_measured(make):
    model = keras.Sequential([keras.Input((3,)), make()])
    x = draw(10, 3)
    if "mixed" in str(model.layers[-1].dtype_policy.name):
        x = x.astype("float16")
    assert_close([wide(x).mean(0), wide(x).var(0)], refreshed(model, x, batch_size=4), ulps=2)


def test_a_layer_used_twice_pools_both_uses():
    norm, inputs = layers.BatchNormalization(), (keras.Input((3,)), keras.Input((3,)))
    model = keras.Model(inputs, layers.Add()([norm(inputs[0]), norm(inputs[1])]))
    x, y = draw(10, 3), 2 * draw(10, 3, seed=1)
    both = wide(np.concatenate([x, y]))
    received = refreshed(model, [x, y], batch_size=4)
    assert_close([both.mean(0), both.var(0)], received, ulps=2)


@pytest.mark.tensorflow
@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_statistics_are_per_channel_of_any_axis(axis):
    model = keras.Sequential([keras.Input((4, 5, 3)), layers.BatchNormalization(axis=axis)])
    x = draw(6, 4, 5, 3)
    flat = wide(np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]))
    assert_close([flat.mean(0), flat.var(0)], refreshed(model, x, batch_size=4), ulps=2)


def test_what_is_masked_does_not_count():
    model = keras.Sequential([keras.Input((4, 3)), layers.Masking(), layers.BatchNormalization()])
    x = draw(6, 4, 3)
    x[0] = x[1, 2:] = x[5, :1] = 0
    counted = wide(x[x.any(-1)])
    # The first batch is masked as a whole.
    assert_close([counted.mean(0), counted.var(0)], refreshed(model, x, batch_size=1), ulps=2)


@pytest.mark.tensorflow
def test_moments_pass_over_masked_entries_that_are_not_a_number():
    x = keras.ops.convert_to_tensor([[[1.0], [np.nan], [3.0]]])
    mask = keras.ops.convert_to_tensor([[True, False, True]])
    with backend.double_precision():
        assert [float(value[0]) for value in moments(x, -1, mask)] == [2, 2, 1]


@pytest.mark.tensorflow
def test_a_pool_keeps_the_digits_of_a_small_variance_far_from_zero():
    x = 1e6 + np.random.default_rng(0).normal(size=(1000, 1))
    with backend.double_precision():
        pool = Pool((1,))
        for batch in np.split(x, [1, 10, 400]):
            pool.add(*moments(keras.ops.convert_to_tensor(batch), -1))
        np.testing.assert_allclose(pool.mean.numpy(), x.mean(0), rtol=1e-15)
        np.testing.assert_allclose(pool.variance(), x.var(0), rtol=1e-9)


class Batches(keras.utils.PyDataset):
    """Three batches with targets and weights."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 3

    def __getitem__(self, i):
        x = self.x[4 * i : 4 * i + 4]
        return x, np.zeros(len(x)), np.ones(len(x))


def make_dataset(arrays):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays).batch(4)


SOURCES = {
    "tensor": keras.ops.convert_to_tensor,
    "dataset": lambda x: make_dataset((x, x)),
    "generator": lambda x: ((x[i : i + 4],) for i in (0, 4, 8)),
    "PyDataset": Batches,
}


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=OF_TENSORFLOW if name == "dataset" else ())
        for name, make in SOURCES.items()
    ],
)
def test_data_of_any_kind_gives_what_arrays_give(make):
    x = draw(11, 6)
    model = make_two_in_sequence()
    settings = {"batch_size": 4} if make is keras.ops.convert_to_tensor else {}
    expected = refreshed(model, x, batch_size=4)
    assert_identical(expected, refreshed(model, make(x), **settings))


def test_steps_limit_the_batches():
    x, model = draw(12, 6), make_two_in_sequence()
    endless = ((x[4 * (i % 3) :][:4],) for i in itertools.count())
    assert_identical(refreshed(model, x[:8], batch_size=4), refreshed(model, endless, steps=2))


def test_no_other_weight_changes_and_dropout_is_off():
    model = keras.Sequential(
        [
            keras.Input((4, 3), batch_size=4),
            layers.Dropout(0.9),
            layers.GRU(3, stateful=True, return_sequences=True),
            layers.BatchNormalization(),
        ]
    )
    statistics = {id(model.layers[-1].moving_mean), id(model.layers[-1].moving_variance)}
    others = [v for v in model.variables if id(v) not in statistics]
    before = [v.numpy() for v in others]
    given = wide(keras.Sequential(model.layers[1:2])(draw(4, 4, 3), training=False)).reshape(-1, 3)
    model.layers[1].reset_states()
    received = refreshed(model, draw(4, 4, 3), batch_size=4)
    assert_close([given.mean(0), given.var(0)], received, ulps=16)
    assert_identical(before, [v.numpy() for v in others])


def test_frozen_layers_keep_their_statistics_and_normalize_with_them():
    model = make_two_in_sequence()
    model.layers[1].trainable = False
    before, x = norms(model), draw(20, 6)
    after = refreshed(model, x, batch_size=7)
    assert_identical(before[:2], after[:2])
    given = wide(keras.Sequential(model.layers[:3])(x, training=False))
    assert_close([given.mean(0), given.var(0)], after[2:], ulps=16)


@pytest.mark.parametrize("reason", ["no BatchNormalization layer", "frozen"])
def test_a_model_without_statistics_to_refresh_says_so(capsys, reason):
    model = make_two_in_sequence()
    if reason == "frozen":
        model.trainable = False
    else:
        model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    refresh_statistics(model, data=None)
    assert reason in capsys.readouterr().out
    refresh_statistics(model, data=None, verbose=0)
    assert capsys.readouterr().out == ""


class Interrupted(keras.utils.PyDataset):
    """A batch, then what the test gives."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, i):
        if i:
            raise self.error
        return (draw(4, 6),)


@pytest.mark.tensorflow
def test_if_the_pass_fails_or_is_interrupted_the_old_statistics_stand():
    model = make_two_in_sequence()
    refreshed(model, draw(8, 6))
    before = [v.numpy() for v in model.variables]
    call = model.layers[1].call
    for error in (RuntimeError("no disk"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            refresh_statistics(model, Interrupted(error), verbose=0)
        assert_identical(before, [v.numpy() for v in model.variables])
    assert model.layers[1].call == call


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("make", "array", "message"),
    [
        (np.copy, np.zeros((0, 6), "float32"), "at least one example"),
        pytest.param(
            *(make_dataset, np.zeros((0, 6), "float32"), "at least one"), marks=OF_TENSORFLOW
        ),
        (np.copy, np.full((4, 6), np.inf, "float32"), "must be finite"),
    ],
    ids=["empty array", "empty dataset", "infinite"],
)
def test_data_that_gives_no_statistics_are_refused_and_the_old_ones_stand(make, array, message):
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    before = norms(model)
    with pytest.raises(ValueError, match=message):
        refresh_statistics(model, make(array), verbose=0)
    assert_identical(before, norms(model))


# PolyakModel.refresh_statistics


def test_the_average_model_is_measured_with_the_averaged_weights_and_nothing_else_changes(batches):
    model = trained(batches, UniformAverage())
    average, raw = model.average_model, model.raw_model.get_weights()
    norm = average.layers[1]
    statistics = {id(norm.moving_mean), id(norm.moving_variance)}
    others = [v for v in average.variables if id(v) not in statistics]
    before = [v.numpy() for v in others]
    given = wide(average.layers[0](batches[0]))
    model.refresh_statistics(batches[0], batch_size=10, verbose=0)
    assert_close([given.mean(0), given.var(0)], norms(average), ulps=2)
    assert_identical(before, [v.numpy() for v in others])
    assert_identical(raw, model.raw_model.get_weights())
    assert model.average_step == 16


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_the_average_goes_on_from_refreshed_statistics(batches, policy):
    keras.config.set_dtype_policy(policy)
    inner = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    inner.compile("sgd", "mse")
    model = PolyakModel(inner, UniformAverage(), compensated=True)
    model.fit(batches[0], batches[0], batch_size=4, verbose=0)
    model.refresh_statistics(batches[0], verbose=0)
    (start, _), (last, _) = norms(model.average_model), norms(model.raw_model)
    model.update_average()
    expected = start.astype("float64") + (last.astype("float64") - start) / 17
    precision = {"float32": 1e-6, "bfloat16": 2**-8}[policy]
    received = norms(model.average_model)[0].astype("float64")
    np.testing.assert_allclose(received, expected, rtol=precision, atol=1e-7)


def test_layers_frozen_in_the_raw_model_keep_their_statistics(batches, capsys):
    model = trained(batches)
    model.raw_model.layers[1].trainable = False
    before = norms(model.average_model)
    model.refresh_statistics(batches[0])
    assert "frozen" in capsys.readouterr().out
    assert_identical(before, norms(model.average_model))


def test_an_average_that_has_not_begun_is_refused():
    model = PolyakModel(compile_classifier(make_classifier()), UniformAverage(start_step=3))
    model.update_average()
    with pytest.raises(ValueError, match="after 1 optimizer steps, .* start_step=3"):
        model.refresh_statistics(draw(4, 6))


@pytest.mark.tensorflow
def test_under_a_strategy_every_replica_gets_the_statistics(strategy, batches):
    with strategy.scope():
        model = trained(batches, UniformAverage())
    given = wide(model.average_model.layers[0](batches[0]))
    model.refresh_statistics(batches[0], batch_size=10, verbose=0)
    norm = model.average_model.layers[1]
    for variable, expected in (
        (norm.moving_mean, given.mean(0)),
        (norm.moving_variance, given.var(0)),
    ):
        for copy in strategy.experimental_local_results(variable.value):
            assert_close([expected], [copy.numpy()], ulps=2)
