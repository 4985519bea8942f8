"""Updates on PyTorch: by lists of tensors, and the formula for iterates that are not finite."""

import gc

import keras
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import Pair

from polyak_model import backend

if keras.backend.backend() != "torch":
    pytest.skip("for PyTorch", allow_module_level=True)

from polyak_model.backend.torch import groups
from polyak_model.backend.torch import update as updates

FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)
WEIGHTS = st.floats(0, 1)
EPS = np.finfo("float32").eps
LARGEST = float(np.finfo("float32").max)


def variables(*values, dtype="float32"):
    return [keras.Variable(np.array(value, dtype)) for value in values]


def updated(average, iterate, weight, residual=None):
    """Returns an average after one update, with its residual if it has one."""
    given = [value for value in (average, iterate, residual) if value is not None]
    pair = Pair(*variables(*given))
    backend.update([([pair], keras.ops.convert_to_tensor(weight, "float64"))])
    if residual is None:
        return pair.target.numpy()
    return pair.target.numpy(), pair.residual.numpy()


@given(average=FLOATS, iterate=FLOATS)
def test_a_weight_of_one_is_the_iterate_and_of_zero_the_average_bit_for_bit(average, iterate):
    for weight, expected in ((1.0, iterate), (0.0, average)):
        moved = updated(average, iterate, weight)
        np.testing.assert_array_equal(moved.view("int32"), np.float32(expected).view("int32"))


@given(average=FLOATS, weight=WEIGHTS)
def test_an_average_that_equals_the_iterate_stays(average, weight):
    np.testing.assert_array_equal(updated(average, average, weight), np.float32(average))


@given(average=FLOATS, iterate=FLOATS, weight=WEIGHTS)
def test_an_update_is_exact_to_three_roundings(average, iterate, weight):
    a, w = np.float64(np.float32(average)), np.float64(np.float32(iterate))
    expected = a + np.float64(np.float32(weight)) * (w - a)
    # Half a unit of the difference, which may be twice as large, of the product and of the sum.
    tolerance = 3 * EPS * np.maximum(np.abs(a), np.abs(w)) + np.finfo("float32").tiny
    assert np.all(np.abs(updated(average, iterate, weight) - expected) <= tolerance)


@given(average=FLOATS, iterate=FLOATS, weight=WEIGHTS)
def test_compensation_keeps_the_sum_of_average_and_residual_exact(average, iterate, weight):
    a, w = np.float64(np.float32(average)), np.float64(np.float32(iterate))
    expected = a + np.float64(np.float32(weight)) * (w - a)
    moved, rest = updated(average, iterate, weight, np.zeros(4))
    scale = max(np.abs(a).max(), np.abs(w).max(), 1e-30)
    assert np.abs(np.float64(moved) + rest - expected).max() <= 2.5e-7 * scale


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_average_stays_where_the_iterate_is_not_finite(bad, weight):
    average, iterate = [1.0] * 4, [bad, 2.0, 2.0, 2.0]
    expected = [1, *[1 + weight] * 3]
    np.testing.assert_allclose(updated(average, iterate, weight), expected, rtol=1e-7)
    moved, rest = updated(average, iterate, weight, [1e-9, 0, 0, 0])
    np.testing.assert_allclose(moved, expected, rtol=1e-7)
    assert rest[0] == np.float32(1e-9)


@pytest.mark.parametrize("together", [1, 5, groups.TOGETHER])
def test_an_iterate_that_is_not_finite_does_not_stop_the_other_averages(together, monkeypatch):
    monkeypatch.setattr(groups, "TOGETHER", together)
    iterates = [[3.0, np.nan if n == 2 else 3.0] for n in range(5)]
    pairs = [Pair(*variables([1.0, 1.0], iterate)) for iterate in iterates]
    backend.update([(pairs, keras.ops.convert_to_tensor(0.25, "float64"))])
    moved = [pair.target.numpy().tolist() for pair in pairs]
    assert moved == [[1.5, 1.0 if n == 2 else 1.5] for n in range(5)]


@pytest.mark.parametrize("weight", [0.0, 1e-9, 0.25, 0.999, 1.0])
@pytest.mark.parametrize(
    ("average", "iterate"),
    [
        ([LARGEST, -LARGEST, 3e38, -2e38], [-LARGEST, LARGEST, -3e38, 2.5e38]),
        ([1e38, -3e38, 0.0, LARGEST], [-3e38, 1e38, LARGEST, -1.0]),
        ([LARGEST, -LARGEST, LARGEST, 3e38], [-9e30, 9e30, 1.0, -1.0]),
    ],
)
def test_an_average_of_finite_iterates_is_finite_though_their_difference_overflows(
    average, iterate, weight
):
    a, w = np.float64(np.float32(average)), np.float64(np.float32(iterate))
    c = np.float64(np.float32(weight))
    tolerance = 3 * EPS * np.maximum(np.abs(a), np.abs(w))
    assert np.all(np.abs(updated(average, iterate, weight) - ((1 - c) * a + c * w)) <= tolerance)
    residual = np.float32(np.abs(average) * 2.0**-26)
    moved, rest = updated(average, iterate, weight, residual)
    exact = (1 - c) * (a + residual) + c * w
    assert np.all(np.abs(moved - exact) <= tolerance)
    assert np.all(np.abs(moved + np.float64(rest) - exact) <= tolerance)


def test_several_averages_share_one_check_of_the_iterates(monkeypatch):
    checked = []
    check = updates._is_moderate
    monkeypatch.setattr(
        updates, "_is_moderate", lambda w, threads: checked.append(w) or check(w, threads)
    )
    _, iterate = variables([1.0, 2.0], [5.0, np.nan])
    pairs = [Pair(*variables([1.0, 2.0]), iterate) for _ in range(3)]
    backend.update([([pair], weight) for pair, weight in zip(pairs, (0.0, 0.25, 1.0), strict=True)])
    assert [pair.target.numpy().tolist() for pair in pairs] == [[1, 2], [2, 2], [5, 2]]
    assert len(checked) == 1


def test_small_tensors_are_checked_without_threads_that_would_wait_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr(torch, "dot", lambda *args: pytest.fail("starts threads of BLAS"))
    pairs = [Pair(*variables([1.0] * 12_000, [2.0] * 12_000)) for _ in range(5)]
    backend.update([(pairs, 0.5)])
    backend.update([(pairs[:1], 0.5)])
    assert set(pairs[0].target.numpy()) == {1.75}
    assert set(pairs[-1].target.numpy()) == {1.5}


@pytest.mark.parametrize("bad", [None, np.nan, LARGEST])
def test_a_compensated_average_in_blocks_is_that_of_whole_tensors_bit_for_bit(bad, monkeypatch):
    generator = np.random.default_rng(0)
    average, iterate, residual = generator.normal(size=(3, 4, 5, 2))
    if bad is not None:
        iterate[2, 1, 0] = bad
    results = []
    for block in (updates.BLOCK, 7):
        monkeypatch.setattr(updates, "BLOCK", block)
        pairs = [Pair(*variables(average, iterate, 1e-8 * residual)) for _ in range(3)]
        # The same values in another order in memory, as of images with channels last.
        last = pairs[-1].raw
        last._value = last.value.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        backend.update([(pairs[:2], 0.3)])
        backend.update([(pairs[2:], 0.3)])
        results.append([[pair.target.numpy(), pair.residual.numpy()] for pair in pairs])
    np.testing.assert_array_equal(*results)
    assert not np.array_equal(results[0][0][0], average)
    np.testing.assert_array_equal(results[0][0], results[0][2])


OPERATIONS = 6


@pytest.mark.parametrize("done", range(OPERATIONS + 1))
def test_an_interrupt_leaves_a_compensated_average_as_it_was_or_moved(done, monkeypatch):
    calls = []

    def interrupted(function):
        def call(*args, **kwargs):
            if len(calls) == done:
                raise KeyboardInterrupt
            calls.append(function)
            return function(*args, **kwargs)

        return call

    for name in [name for name in dir(torch) if name.startswith("_foreach_")]:
        monkeypatch.setattr(torch, name, interrupted(getattr(torch, name)))
    (pair,) = [Pair(*variables([4.0], [5.0], [1e-8]))]
    if done < OPERATIONS:
        with pytest.raises(KeyboardInterrupt):
            backend.update([([pair], 0.25)])
    else:
        backend.update([([pair], 0.25)])
    assert pair.target.numpy() in ([4.0], [4.25])
    # A residual that does not belong to it is at most a step.
    assert abs(pair.residual.numpy()) <= 0.2500001
    assert len(calls) == done


def test_weights_of_16_bits_are_averaged_in_float32():
    (target,), (raw,) = variables([1.0]), variables([1.5], dtype="float32")
    raw = keras.Variable(raw.numpy(), dtype="bfloat16")
    backend.update([([Pair(target, raw)], 0.001)])
    assert target.numpy() == np.float32(1 + np.float32(0.001) * 0.5)


def test_updates_leave_no_gradients():
    average, raw = variables([1.0], [2.0])
    raw.trainable = True
    assert raw.value.requires_grad
    backend.update([([Pair(average, raw)], 0.5)])
    average.trainable = False
    assert average.value.grad_fn is None
    assert raw.value.grad is None


@pytest.mark.parametrize("together", [6, groups.TOGETHER])
def test_weights_of_several_dtypes_and_sizes_are_updated_as_each_by_itself(together, monkeypatch):
    monkeypatch.setattr(groups, "TOGETHER", together)
    monkeypatch.setattr(groups, "SMALL", 4)
    kinds = [("float32", 3), ("float64", 2), ("float32", 9), ("bfloat16", 4), ("float32", 2)] * 3
    generator = np.random.default_rng(0)
    pairs = []
    for dtype, size in kinds:
        average = keras.Variable(generator.normal(size=size), dtype=dtype)
        iterate = keras.Variable(generator.normal(size=size), dtype=dtype)
        target = average if dtype != "bfloat16" else keras.Variable(average, dtype="float32")
        pairs.append(Pair(target, iterate))
    for _ in range(2):
        alone = [Pair(keras.Variable(p.target, dtype=p.target.dtype), p.raw) for p in pairs]
        backend.update([(pairs, 0.25)])
        for pair, single in zip(pairs, alone, strict=True):
            backend.update([([single], 0.25)])
            np.testing.assert_array_equal(pair.target.numpy(), single.target.numpy())
            pair.raw.assign(-pair.raw)


def test_averages_of_fewer_weights_of_a_model_are_grouped_anew():
    iterates = variables(*[[float(n)] * 2 for n in range(4)])
    pairs = [Pair(*variables([0.0, 0.0]), iterate) for iterate in iterates]
    for own in (pairs, pairs[:2], pairs):
        backend.update([(own, 0.5)])
    assert [pair.target.numpy().tolist() for pair in pairs] == [
        [0, 0],
        [0.875] * 2,
        [1.5] * 2,
        [2.25] * 2,
    ]


def test_groups_are_dropped_with_their_averages():
    pairs = [Pair(*variables([1.0], [2.0])) for _ in range(3)]
    backend.update([(pairs, 0.5)])
    before = len(groups._groupings)
    del pairs
    gc.collect()
    assert len(groups._groupings) < before
