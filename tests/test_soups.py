import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model.soups import greedy_soup

numbers = st.floats(-1e6, 1e6, width=32)
modes = st.sampled_from(["max", "min"])


@st.composite
def kitchens(draw, equal=False):
    """Candidates of one or two arrays, a score for them, and its mode."""
    shapes = draw(st.lists(st.sampled_from([(), (2,), (2, 3)]), min_size=1, max_size=2))
    many = draw(st.integers(1, 6))

    def weights():
        return [np.array(draw(numbers), "float32") + np.zeros(shape, "float32") for shape in shapes]

    drawn = [weights()] * many if equal else [weights() for _ in range(many)]
    target = draw(numbers)
    return (
        {f"candidate {i}": drawn[i].copy for i in range(many)},
        lambda arrays: sum(np.abs(np.float64(array) - target).sum() for array in arrays),
        draw(modes),
    )


def better(mode):
    return max if mode == "max" else min


@given(kitchens())
def test_the_soup_is_never_worse_than_the_best_candidate(kitchen):
    candidates, score, mode = kitchen
    soup = greedy_soup(candidates, score, mode)
    best = better(mode)(score(read()) for read in candidates.values())
    assert better(mode)(soup.score, best) == soup.score


@given(kitchens())
def test_the_score_of_the_soup_is_that_of_its_weights(kitchen):
    candidates, score, mode = kitchen
    soup = greedy_soup(candidates, score, mode)
    assert score(soup.weights) == soup.score
    assert soup.score == [each.soup_score for each in soup.trials if each.kept][-1]


@given(kitchens())
def test_candidates_are_tried_in_the_order_of_their_own_scores(kitchen):
    candidates, score, mode = kitchen
    trials = greedy_soup(candidates, score, mode).trials
    assert sorted(each.name for each in trials) == sorted(candidates)
    own_scores = [each.own_score for each in trials]
    assert own_scores == [score(candidates[each.name]()) for each in trials]
    assert own_scores == sorted(own_scores, reverse=mode == "max")
    assert trials[0].kept


@given(kitchens())
def test_a_candidate_is_kept_if_and_only_if_the_soup_with_it_is_no_worse(kitchen):
    soup = greedy_soup(*kitchen)
    best = soup.trials[0].own_score
    for each in soup.trials:
        assert each.kept == (better(kitchen[-1])(each.soup_score, best) == each.soup_score)
        best = each.soup_score if each.kept else best


@given(kitchens())
def test_the_soup_is_the_uniform_average_of_those_kept(kitchen):
    candidates, score, mode = kitchen
    soup = greedy_soup(candidates, score, mode)
    kept = [candidates[each.name]() for each in soup.trials if each.kept]
    for array, *originals in zip(soup.weights, *kept, strict=True):
        assert array.dtype == np.float64
        exact = np.mean(np.asarray(originals, "float64"), axis=0)
        largest = np.max(np.abs(originals), initial=0)
        np.testing.assert_allclose(array, exact, rtol=0, atol=1e-15 * len(kept) * largest)


@given(kitchens(equal=True))
def test_candidates_that_are_all_equal_are_all_kept_and_are_the_soup_bit_for_bit(kitchen):
    candidates, score, mode = kitchen
    soup = greedy_soup(candidates, score, mode)
    assert all(each.kept for each in soup.trials)
    for array, original in zip(soup.weights, candidates["candidate 0"](), strict=True):
        np.testing.assert_array_equal(array, original)


@given(kitchens())
def test_candidates_of_equal_score_are_tried_in_the_order_given(kitchen):
    soup = greedy_soup(kitchen[0], lambda _: 1.0, kitchen[2])
    assert [each.name for each in soup.trials] == list(kitchen[0])
    assert all(each.kept for each in soup.trials)


@given(kitchens())
def test_the_largest_score_is_the_smallest_of_its_negative(kitchen):
    candidates, score, _ = kitchen
    largest = greedy_soup(candidates, score, "max")
    smallest = greedy_soup(candidates, lambda arrays: -score(arrays), "min")
    assert largest.score == -smallest.score
    for one, other in zip(largest.trials, smallest.trials, strict=True):
        assert (one.name, one.kept) == (other.name, other.kept)


def test_integers_come_from_the_last_kept():
    weights = {"a": (3.0, 7), "b": (4.0, 8), "c": (9.0, 9)}
    candidates = {
        name: lambda pair=pair: [np.float32(pair[0]), np.int64(pair[1])]
        for name, pair in weights.items()
    }
    soup = greedy_soup(candidates, lambda arrays: abs(arrays[0] - 3.4), "min")
    assert [each.kept for each in soup.trials] == [True, True, False]
    assert soup.weights[1] == 8
    assert soup.weights[1].dtype == np.int64


def test_a_score_that_is_not_a_number_is_worse_than_any():
    candidates = {name: lambda w=w: [np.array(w)] for name, w in [("a", math.nan), ("b", 1.0)]}
    for mode in ("max", "min"):
        soup = greedy_soup(candidates, lambda arrays: arrays[0], mode)
        assert [(each.name, each.kept) for each in soup.trials] == [("b", True), ("a", False)]
        assert soup.weights == [1.0]


def test_infinite_weights_leave_the_soup_as_it_is():
    candidates = {name: lambda w=w: [np.array(w)] for name, w in [("a", math.inf), ("b", 1.0)]}
    assert greedy_soup(candidates, lambda arrays: arrays[0], "min").weights == [1.0]


def test_no_two_candidates_are_held_at_once():
    alive, most = set(), 0

    class Weights(list):
        def __del__(self):
            alive.discard(id(self))

    def read():
        nonlocal most
        weights = Weights([np.zeros(3)])
        alive.add(id(weights))
        most = max(most, len(alive))
        return weights

    greedy_soup(dict.fromkeys("abcdef", read), lambda _: 0.0)
    assert most == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (({}, len), "At least one of `candidates` must have a score"),
        (({"a": lambda: []}, lambda _: math.nan), "Received: {'a': nan}. Check the candidates"),
        (({"a": lambda: []}, len, "best"), "`mode` must be one of 'max', 'min'"),
        (
            ({"a": lambda: [np.zeros(2)], "b": lambda: [np.zeros(3)]}, len),
            r"Received: \(3,\) in 'b' in place of \(2,\)",
        ),
    ],
)
def test_what_cannot_be_cooked_is_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        greedy_soup(*arguments)
