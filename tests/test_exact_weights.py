"""The weight of every rule is exact to float64 rounding from step 1 to step ten million."""

from decimal import Context, Decimal, localcontext
from functools import partial

import numpy as np
import pytest
import tensorflow as tf

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage

STEPS = [1, 2, 3, 10, 1000, 9999, 10_000, 10_000_000]
STRIDES = [1, 10]
DECAYS = [0.0, 0.9, 0.999, 0.99999, 0.9999999]


def debiased(d, t, k):
    return (1 - d**k) / (1 - d**t)


def biased(d, t, k):
    return 1 - d**k


def warming_up(d, t, k):
    n = t / k - 1
    return 1 - min(d, (1 + n) / (10 + n)) ** k


def uniform(_, t, k):
    return k / t


def polynomial(eta, t, k):
    n = t / k - 1
    return (eta + 1) / (n + 1 + eta)


def power(gamma, t, k):
    return 1 - (1 - k / t) ** (gamma + 1)


FAMILIES = {
    "debiased": (ExponentialAverage, debiased, DECAYS),
    "biased": (partial(ExponentialAverage, debias=False), biased, DECAYS),
    "warmup": (partial(ExponentialAverage, warmup=True), warming_up, DECAYS),
    "uniform": (lambda _, **kwargs: UniformAverage(**kwargs), uniform, [0]),
    "polynomial": (PolynomialAverage, polynomial, [0.5, 3]),
    "power": (PowerAverage, power, [0.5, 6.94, 1000]),
}
CASES = [(*family[:2], number) for family in FAMILIES.values() for number in family[2]]
COMPILERS = {
    "int": None,
    "eager": lambda function: function,
    "graph": partial(tf.function, autograph=False),
    "xla": partial(tf.function, autograph=False, jit_compile=True),
}


def due_steps(stride):
    return [step for step in STEPS if step >= stride]


def exact_weights(formula, number, stride):
    """Computes a formula to 60 digits from the exact value of the float64."""
    with localcontext(Context(prec=60)):
        return np.array(
            [
                float(formula(Decimal(number), Decimal(t), Decimal(stride)))
                for t in due_steps(stride)
            ]
        )


@pytest.fixture(scope="module")
def exact():
    """The weights of all cases at all due steps, by stride."""
    return {
        stride: [exact_weights(formula, number, stride) for _, formula, number in CASES]
        for stride in STRIDES
    }


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_weight_is_exact_to_float64_rounding_from_the_first_to_the_ten_millionth_step(
    exact, compiler, stride
):
    made = [make(number) for make, _, number in CASES]
    steps = due_steps(stride)

    def weights(step):
        return [rule.weight(step, stride) for rule in made]

    if compiler == "int":
        received = [[rule.weight(step, stride) for step in steps] for rule in made]
    else:
        received = COMPILERS[compiler](weights)(tf.constant(steps, "int64"))
    for rule, expected, weight in zip(made, exact[stride], received, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-15, atol=0, err_msg=repr(rule))


@pytest.mark.parametrize("start_step", [1, 10**6])
def test_steps_after_the_start_step_weigh_as_the_first_ones_do(exact, start_step):
    for (make, _, number), expected in zip(CASES, exact[1], strict=True):
        rule = make(number, start_step=start_step)
        received = [rule.weight(start_step + step) for step in STEPS]
        np.testing.assert_allclose(received, expected, rtol=1e-15, atol=0, err_msg=repr(rule))


@pytest.mark.parametrize(
    ("decay", "error"), [(0.999, 1e-5), (0.9999, 1e-4), (0.99999, 1e-3), (0.9999999, 0.1)]
)
def test_float32_would_lose_the_digits_that_these_tests_check(decay, error):
    single = np.float32(1) - np.float32(decay)
    (exact,) = set(exact_weights(biased, decay, 1))
    assert abs(single / exact - 1) > error
