import collections
import itertools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from keras import tree
from models import make_net_of_every_size
from pairs import Pair

from polyak_model import PolyakModel, backend
from polyak_model.backend.tensorflow import kernels, packed_handles
from polyak_model.backend.tensorflow import update as updates

# TensorFlow's kernels flush subnormal numbers to zero.
FLOATS = st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=4, max_size=4)


def variables(*values, dtype="float32"):
    return tuple(keras.Variable(np.array(value, dtype)) for value in values)


def compile_whole(function):
    return tf.function(function, jit_compile=True)


def call(function):
    return function


MEANS = {
    "eager": (call, {}),
    "graph": (tf.function, {"can_be_grouped": lambda pair: False}),
    "graph, grouped": (tf.function, {}),
    "graph, grouped, checked separately": (tf.function, {"FEW": 1}),
    "graph, grouped, not packed": (tf.function, {"ENABLED": False}),
    "compiled": (tf.function, {"LARGE": 1, "HUGE": 1}),
    "compiled, eager": (call, {"LARGE": 1, "HUGE": 1}),
    "compiled as a whole": (compile_whole, {}),
}


@pytest.fixture(params=MEANS)
def compiler(request, monkeypatch):
    """Compiles a function that updates averages, once for each means of updating them."""
    compiler, settings = MEANS[request.param]
    for name, value in settings.items():
        module = packed_handles if name == "ENABLED" else updates
        monkeypatch.setattr(module, name, value)
    return compiler


@pytest.fixture
def plain(compiler):
    """Updates an average of four values."""
    pair = a, w, _ = Pair(*variables(np.zeros(4), np.zeros(4)))
    update = compiler(lambda weight: backend.update([([pair], weight)]))

    def updated(average, iterate, weight):
        a.assign(np.array(average, "float32"))
        w.assign(np.array(iterate, "float32"))
        update(tf.constant(weight, "float64"))
        return a.numpy()

    return updated


@pytest.fixture
def compensated(compiler):
    """Updates an average and its residual."""
    pair = a, w, r = Pair(*variables(*[np.zeros(4)] * 3))
    update = compiler(lambda weight: backend.update([([pair], weight)]))

    def updated(average, iterate, residual, weight):
        a.assign(np.array(average, "float32"))
        w.assign(np.array(iterate, "float32"))
        r.assign(np.array(residual, "float32"))
        update(tf.constant(weight, "float64"))
        return a.numpy(), r.numpy()

    return updated


SAME_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@SAME_FIXTURE
@given(average=FLOATS, iterate=FLOATS)
def test_a_weight_of_one_is_the_iterate_and_of_zero_the_average_bit_for_bit(
    plain, average, iterate
):
    for weight, expected in ((1.0, iterate), (0.0, average)):
        moved = plain(average, iterate, weight)
        np.testing.assert_array_equal(moved, np.array(expected, "float32"))


@SAME_FIXTURE
@given(average=FLOATS, weight=st.floats(0, 1))
def test_an_average_that_equals_the_iterate_stays_bit_for_bit(plain, average, weight):
    np.testing.assert_array_equal(plain(average, average, weight), np.array(average, "float32"))


@SAME_FIXTURE
@given(average=FLOATS, iterate=FLOATS, weight=st.floats(0, 1))
def test_an_update_is_exact_to_three_roundings(plain, average, iterate, weight):
    a, w = (np.array(values, "float32").astype("float64") for values in (average, iterate))
    expected = a + np.float64(np.float32(weight)) * (w - a)
    scale = np.maximum(np.abs(a), np.abs(w))
    error = np.abs(plain(average, iterate, weight) - expected)
    # Half a unit of the difference, which may be twice as large, of the product and of the sum.
    assert np.all(error <= 3 * np.finfo("float32").eps * scale + np.finfo("float32").tiny)


@SAME_FIXTURE
@given(average=FLOATS, iterate=FLOATS, weight=st.floats(0, 1))
def test_compensation_keeps_the_sum_of_average_and_residual_exact(
    compensated, average, iterate, weight
):
    c = np.float64(np.float32(weight))
    expected = np.array(average, "float32") + c * (
        np.float64(np.array(iterate, "float32")) - np.array(average, "float32")
    )
    a, r = compensated(average, iterate, np.zeros(4), weight)
    scale = max(np.abs(average).max(), np.abs(iterate).max(), 1e-30)
    assert np.abs(a.astype("float64") + r - expected).max() <= 2.5e-7 * scale


@pytest.fixture
def update_group():
    """Updates a group of two compensated averages, whose values are the rows of arrays."""
    pairs = [Pair(*variables(*[np.zeros(2)] * 3)) for _ in range(2)]
    update = tf.function(lambda weight: backend.update([(pairs, weight)]))

    def updated(weight, iterate, average, residual):
        values = zip(average, iterate, residual, strict=True)
        for variable, value in zip(tree.flatten(pairs), tree.flatten(list(values)), strict=True):
            variable.assign(value)
        update(weight)
        return [[pair.target.numpy() for pair in pairs], [pair.residual.numpy() for pair in pairs]]

    return updated


@SAME_FIXTURE
@example(
    average=[524290.0] * 4, iterate=[1.03125] * 4, fractions=[0.0] * 4, weight=np.nextafter(1, 0)
)
@given(average=FLOATS, iterate=FLOATS, fractions=FLOATS, weight=st.floats(0, 1))
def test_a_group_of_compensated_averages_is_updated_by_the_formula_bit_for_bit(
    update_group, average, iterate, fractions, weight
):
    a, w, f = (np.reshape(np.float32(each), (2, 2)) for each in (average, iterate, fractions))
    r = np.spacing(a) * f / np.float32(4e6)
    expected = kernels.updated_compensated(tf.constant(weight, "float32"), w, a, r)
    np.testing.assert_array_equal(update_group(tf.constant(weight, "float64"), w, a, r), expected)


def test_the_average_stays_where_the_iterate_is_not_finite(plain, compensated):
    for bad, weight in itertools.product([np.nan, np.inf, -np.inf], [0.0, 0.3, 1.0]):
        average, iterate = [1.0] * 4, [bad, 2.0, 2.0, 2.0]
        expected = [1, *[1 + weight] * 3]
        np.testing.assert_allclose(plain(average, iterate, weight), expected, rtol=1e-7)
        a, r = compensated(average, iterate, [1e-9, 0, 0, 0], weight)
        np.testing.assert_allclose(a, expected, rtol=1e-7)
        assert r[0] == np.float32(1e-9)


@pytest.mark.parametrize("rest", [(), ([0.0, 0.0],)], ids=["plain", "compensated"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_iterate_that_is_not_finite_does_not_stop_the_other_averages(
    bad, rest, compiler, monkeypatch
):
    monkeypatch.setattr(updates, "TOGETHER", 4)
    monkeypatch.setattr(updates, "FEW", max(updates.FEW, 2))
    pairs = [Pair(*variables([1.0, 1.0], [3.0, bad if n == 2 else 3.0], *rest)) for n in range(5)]
    compiler(lambda: backend.update([(pairs, tf.constant(0.25, "float64"))]))()
    moved = [a.numpy().tolist() for a, *_ in pairs]
    assert moved == [[1.5, 1.0 if n == 2 else 1.5] for n in range(5)]


LARGEST = float(np.finfo("float32").max)
OVERFLOWING = [
    ([LARGEST, -LARGEST, 3e38, -2e38], [-LARGEST, LARGEST, -3e38, 2.5e38]),
    ([1e38, -3e38, 0.0, LARGEST], [-3e38, 1e38, LARGEST, -1.0]),
]


def test_an_average_of_finite_iterates_is_finite_though_their_difference_overflows(
    plain, compensated
):
    weights = [0.0, 1e-9, 0.25, 0.999, 1.0]
    for (average, iterate), weight in itertools.product(OVERFLOWING, weights):
        a, w = np.float64(np.float32(average)), np.float64(np.float32(iterate))
        c = np.float64(np.float32(weight))
        tolerance = 3 * np.finfo("float32").eps * np.maximum(np.abs(a), np.abs(w))
        assert np.all(np.abs(plain(average, iterate, weight) - ((1 - c) * a + c * w)) <= tolerance)
        residual = np.float32(np.abs(average) * 2.0**-26)
        moved, rest = compensated(average, iterate, residual, weight)
        exact = (1 - c) * (a + residual) + c * w
        assert np.all(np.abs(moved - exact) <= tolerance)
        assert np.all(np.abs(moved + np.float64(rest) - exact) <= tolerance)


@pytest.mark.parametrize("bad", [LARGEST, 3e38])
def test_large_iterates_of_opposite_signs_do_not_hide_each_other(bad, compiler):
    pairs = [Pair(*variables([-sign * bad], [sign * bad])) for sign in (1, -1)]
    compiler(lambda: backend.update([(pairs, tf.constant(0.25, "float64"))]))()
    np.testing.assert_allclose([a.numpy()[0] for a, *_ in pairs], [-bad / 2, bad / 2], rtol=3e-7)


def test_iterates_whose_squares_overflow_are_averaged_like_others(plain):
    large = np.float32(2.0**127)
    moved = plain([0.0] * 4, [large, large, -large, 1.0], 0.5)
    np.testing.assert_array_equal(moved, np.float32([large / 2, large / 2, -large / 2, 0.5]))


@pytest.mark.parametrize("compensated", [False, True])
def test_averages_of_one_iterate_are_updated_as_each_would_be_alone(compensated, compiler):
    rest = [np.full(2, 1e-9)] if compensated else []
    (w,) = variables([0.0, 0.0])
    weights = tf.Variable(np.zeros(3))
    together, alone = (
        [Pair(a, w, *r) for a, *r in (variables([0.0, 0.0], *rest) for _ in range(3))]
        for _ in range(2)
    )
    update_together = compiler(
        lambda: backend.update([([p], weights[n]) for n, p in enumerate(together)])
    )
    update_alone = compiler(
        lambda: [backend.update([([p], weights[n])]) for n, p in enumerate(alone)]
    )
    # Moderate, not finite, and such that its difference from an average overflows.
    for start, bad in ((-1.5, 1.5), (1.0, np.nan), (-3e38, 3e38)):
        w.assign(np.float32([bad, -0.3]))
        for n, pair in enumerate(together + alone):
            pair.target.assign(np.float32([start, n % 3 / 3]))
        for each in ([0.3, 0.001, 0.7], [1.0, 0.2, 0.0], [0.3, 1.0, 1.0], [0.6, 0.1, 0.2]):
            weights.assign(each)
            update_together()
            update_alone()
            for one, other in zip(together, alone, strict=True):
                for mine, expected in zip(one, other, strict=True):
                    if mine is not None:
                        np.testing.assert_array_equal(mine.numpy(), expected.numpy())


@pytest.mark.parametrize("rest", [(), ([0.0, 0.0],)], ids=["plain", "compensated"])
def test_operations_after_an_update_see_it(rest, compiler):
    pair = a, w, _ = Pair(*variables([1.0, 2.0], [5.0, 6.0], *rest))

    def twice():
        before = a + 0.0
        backend.update([([pair], tf.constant(0.5, "float64"))])
        between = a + 0.0
        w.assign(between + 4.0)
        backend.update([([pair], tf.constant(0.5, "float64"))])
        after = a + 0.0
        backend.update([([pair], tf.constant(1.0, "float64"))])
        return before, between, after, a + 0.0

    np.testing.assert_array_equal(compiler(twice)(), [[1, 2], [3, 4], [5, 6], [7, 8]])


@pytest.mark.processes
def test_operations_after_an_update_see_it_where_xla_clusters_parts_of_a_graph():
    test = f"{__file__}::{test_operations_after_an_update_see_it.__name__}"
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", test],
        env={**os.environ, "TF_XLA_FLAGS": flags},
        check=True,
    )


@pytest.mark.parametrize("compensated", [False, True])
def test_averages_of_several_shapes_and_dtypes_are_updated(compensated, compiler, monkeypatch):
    for limit in ("LARGE", "HUGE"):
        monkeypatch.setattr(updates, limit, min(getattr(updates, limit), 3))
    pairs = [
        Pair(*variables(*map(np.full, [shape] * (2 + compensated), (0.0, 1.0, 0.0)), dtype=dtype))
        for shape in ((), (2,), (3,), (2, 3), (2,))
        for dtype in ("float32", "float64")
    ]
    compiler(lambda: backend.update([(pairs, tf.constant(0.25, "float64"))]))()
    for a, *_ in pairs:
        np.testing.assert_array_equal(a.numpy(), np.full(a.shape, 0.25))


@pytest.mark.parametrize(("size", "branches"), [(1, 3), (2**16, 1)])
def test_groups_of_small_averages_are_smaller_and_checked_separately(size, branches, monkeypatch):
    monkeypatch.setattr(updates, "FEW", 2)
    pairs = [Pair(*variables(np.zeros(size), np.ones(size))) for _ in range(5)]
    weight = tf.constant(0.25, "float64")
    graph = tf.function(lambda: backend.update([(pairs, weight)])).get_concrete_function().graph
    operations = collections.Counter(operation.type for operation in graph.get_operations())
    assert operations["If"] == branches
    assert operations["L2Loss"] == (0 if size == 1 else 5)


def test_large_compensated_averages_are_updated_in_turn_which_takes_less_memory():
    first = [Pair(*variables(*[np.zeros(updates.LARGE)] * 3)) for _ in range(2)]
    second = [Pair(*variables(raw), raw, *variables(raw)) for _, raw, _ in first]
    update = tf.function(lambda c: backend.update([(first, c), (second, c)]))
    graph = update.get_concrete_function(tf.constant(0.5, "float64")).graph
    calls = [each for each in graph.get_operations() if each.type == "PartitionedCall"]
    assert len(calls) == 4
    for before, after in itertools.pairwise(calls):
        assigned = {reader for output in before.outputs for reader in output.consumers()}
        assert all(assigned <= set(value.op.control_inputs) for value in after.inputs)


@pytest.mark.parametrize(
    ("compensated", "expected"),
    [
        (False, ["alone", "separately", "separately", "in one go"]),
        (True, ["alone", "alone", "separately", "separately", "in one go"]),
    ],
)
def test_the_thresholds_that_ship_are_all_reached_by_the_net_of_every_size(
    compensated, expected, monkeypatch
):
    paths = []

    def update_group(rows, weights, check_separately):
        paths.append("separately" if check_separately else "in one go")

    monkeypatch.setattr(updates, "update_group", update_group)
    monkeypatch.setattr(updates, "_apply", lambda formula, *_: paths.append("alone"))
    model = PolyakModel(make_net_of_every_size(), compensated=compensated)
    tf.function(model.update_average).get_concrete_function()
    assert paths == expected


@pytest.mark.parametrize("iterate_dtype", ["bfloat16", "float16", "float64"])
def test_an_average_is_updated_in_its_own_dtype(compiler, iterate_dtype):
    a = keras.Variable([1.0, 2.0], dtype="float32")
    w = keras.Variable([1.5, 8.0], dtype=iterate_dtype)
    compiler(lambda: backend.update([([Pair(a, w)], tf.constant(2**-12, "float64"))]))()
    np.testing.assert_array_equal(a.numpy(), np.float32([1 + 2**-13, 2 + 6 * 2**-12]))


def test_an_update_leaves_no_trace_on_a_gradient_tape(compiler):
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model = PolyakModel(inner, 0.5)
    weights = inner.trainable_variables
    x = np.ones((2, 3), "float32")

    def gradients():
        with tf.GradientTape() as tape:
            outputs = model.average_model(x), inner(x)
            for weight in weights:
                weight.assign(weight + 1.0)
            model.update_average()
            outputs = *outputs, model.average_model(x)
            loss = sum(tf.reduce_sum(output**2) for output in outputs)
        return tape.gradient(loss, weights)

    def expected():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(inner(x) ** 2)
        return tape.gradient(loss, weights)

    for one, other in zip(expected(), compiler(gradients)(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_variables_of_equal_shape_share_one_compiled_function(monkeypatch):
    monkeypatch.setattr(updates, "LARGE", 1)
    monkeypatch.setattr(updates, "HUGE", 1)
    kernels.traced.cache_clear()
    pairs = [Pair(*variables(np.zeros((2, 3)), np.ones((2, 3)))) for _ in range(4)]
    for _ in range(2):
        tf.function(lambda: backend.update([(pairs, tf.constant(0.5, "float64"))]))()
    assert kernels.traced.cache_info().currsize == 1
    assert all(a.numpy().tolist() == [[0.75] * 3] * 2 for a, *_ in pairs)


def test_without_xla_large_averages_are_updated_by_single_operations(monkeypatch):
    def function(*args, **kwargs):
        raise tf.errors.UnimplementedError(None, None, "XLA is missing")

    monkeypatch.setattr(updates, "LARGE", 1)
    kernels.xla_works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tf, "function", function)
        assert not kernels.xla_works()
        a, w = variables([1.0], [2.0])
        backend.update([([Pair(a, w)], tf.constant(0.5, "float64"))])
    kernels.xla_works.cache_clear()
    assert kernels.xla_works()
    assert a.numpy() == 1.5
