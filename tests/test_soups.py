import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_model.soups import greedy_soup

numbers = st.floats(-1e6, 1e6, width=32)
modes = st.sampled_from(["max", "min"])


@st.composite
def problems(draw, equal=False):
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


@given(problems())
def test_the_soup_is_never_worse_than_the_best_candidate(problem):
    candidates, score, mode = problem
    soup = greedy_soup(candidates, score, mode)
    best = better(mode)(score(read()) for read in candidates.values())
    assert better(mode)(soup.score, best) == soup.score


@given(problems())
def test_the_score_of_the_soup_is_that_of_its_weights(problem):
    candidates, score, mode = problem
    soup = greedy_soup(candidates, score, mode)
    assert score(soup.weights) == soup.score
    assert soup.score == [each.soup_score for each in soup.trials if each.kept][-1]


@given(problems())
def test_candidates_are_tried_in_the_order_of_their_own_scores(problem):
    candidates, score, mode = problem
    trials = greedy_soup(candidates, score, mode).trials
    assert sorted(each.name for each in trials) == sorted(candidates)
    own_scores = [each.own_score for each in trials]
    assert own_scores == [score(candidates[each.name]()) for each in trials]
    assert own_scores == sorted(own_scores, reverse=mode == "max")
    assert trials[0].kept


@given(problems())
def test_a_candidate_is_kept_if_and_only_if_the_soup_with_it_is_no_worse(problem):
    soup = greedy_soup(*problem)
    best = soup.trials[0].own_score
    for each in soup.trials:
        assert each.kept == (better(problem[-1])(each.soup_score, best) == each.soup_score)
        best = each.soup_score if each.kept else best


@given(problems())
def test_the_soup_is_the_uniform_average_of_those_kept(problem):
    candidates, score, mode = problem
    soup = greedy_soup(candidates, score, mode)
    kept = [candidates[each.name]() for each in soup.trials if each.kept]
    for array, *originals in zip(soup.weights, *kept, strict=True):
        assert array.dtype == np.float64
        exact = np.mean(np.asarray(originals, "float64"), axis=0)
        largest = np.max(np.abs(originals), initial=0)
        np.testing.assert_allclose(array, exact, rtol=0, atol=1e-15 * len(kept) * largest)


@given(problems(equal=True))
def test_candidates_that_are_all_equal_are_all_kept_and_are_the_soup_bit_for_bit(problem):
    candidates, score, mode = problem
    soup = greedy_soup(candidates, score, mode)
    assert all(each.kept for each in soup.trials)
    for array, original in zip(soup.weights, candidates["candidate 0"](), strict=True):
        np.testing.assert_array_equal(array, original)


@given(problems())
def test_candidates_of_equal_score_are_tried_in_the_order_given(problem):
    soup = greedy_soup(problem[0], lambda _: 1.0, problem[2])
    assert [each.name for each in soup.trials] == list(problem[0])
    assert all(each.kept for each in soup.trials)


@given(problems())
def test_the_largest_score_is_the_smallest_of_its_negative(problem):
    candidates, score, _ = problem
    largest = greedy_soup(candidates, score, "max")
    smallest = greedy_soup(candidates, lambda arrays: -score(arrays), "min")
    assert largest.score == -smallest.score
    for one, other in zip(largest.trials, smallest.trials, strict=True):
        assert (one.name, one.kept) == (other.name, other.kept)


def test_integers_are_those_of_the_last_kept():
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


def test_two_candidates_are_never_in_memory_at_once():
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


def test_quantized_candidates_are_refused_unless_their_integers_are_equal():
    kernels = {"a": [1, 2], "b": [1, 2], "c": [3, 4]}
    candidates = {name: lambda k=k: [np.array(k, "int8")] for name, k in kernels.items()}
    with pytest.raises(ValueError, match="Quantized `candidates` have no average.* in 'c'"):
        greedy_soup(candidates, lambda _: 1.0)
    del candidates["c"]
    assert greedy_soup(candidates, lambda _: 1.0).weights[0].tolist() == [1, 2]


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
def test_invalid_arguments_are_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        greedy_soup(*arguments)
