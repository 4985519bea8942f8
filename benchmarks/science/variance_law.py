"""Variance reduction of the exponential average at a constant step size: formula and measurement.

    python benchmarks/science/variance_law.py

On a quadratic of curvature lambda, SGD with constant step size gamma becomes a
stationary autoregression with a = 1 - gamma * lambda. The variance of its exponential
average with decay rho, relative to the raw iterate, is

    Var(average) / Var(raw) = (1 - rho) (1 + a rho) / ((1 + rho) (1 - a rho)),

the sum over all pairs of iterates of their shares in the average times their
autocorrelation a**|i-j|. (Averaging SGD at a constant step: Mandt et al. 2017,
Stochastic gradient descent as approximate Bayesian inference.) The only assumption on
the noise is zero mean given the past. So the formula holds for noise added to the
gradient, and for one-example gradients of a regression, whose noise grows with the
error.

The chains start at the optimum. They are sampled after twelve times the longer of the
two memories, and every two memories from then on. The formula fails if the loss is not
quadratic around the iterates (here w**2 / 2 + w**4 / 4, of curvature 1 at the optimum
and more around it), and before the chains are stationary.
"""

import argparse
import math
import pathlib
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from trajectories import COLOURS, style, trajectories

from polyak_model import ExponentialAverage
from polyak_model.cli.tables import format_table

TARGET = 0.03
BETWEEN = 2


@dataclass(frozen=True)
class Setting:
    """A loss with its noise, a step and a decay.

    Attributes:
        rate: Float, gamma * lambda, where lambda is the curvature at the optimum.
        decay: Float, rho.
        problem: `"quadratic"`, with standard normal noise added to the gradient;
            `"regression"`, the gradient of a linear regression at one example,
            with a uniform input of variance 1 and standard normal noise; or
            `"quartic"`, like the first but not quadratic.
        burn_in: Int, memories before the first sample.
    """

    rate: float
    decay: float
    problem: str = "quadratic"
    burn_in: int = 12

    @property
    def memory(self):
        """Int, steps in which both the iterate and the average decay to 1 / e."""
        memories = [1 / (1 - abs(1 - self.rate)), 1 / (1 - self.decay)]
        return math.ceil(max(memories))

    def step(self, chains, seed):
        """Returns the function from an iterate and a step to the next iterate."""

        def key(stream, t):
            return tf.stack([tf.constant(2 * seed + stream, "int64"), t])

        def gradient(w, t):
            noise = tf.random.stateless_normal([chains], key(0, t), dtype="float64")
            if self.problem == "quadratic":
                return w - noise
            if self.problem == "quartic":
                return w + w**3 - noise
            x = tf.random.stateless_uniform([chains], key(1, t), dtype="float64")
            x = 12**0.5 * (x - 0.5)
            return x * (x * w - noise)

        def take_step(iterate, t):
            return iterate - self.rate * gradient(iterate, t)

        return take_step


SETTINGS = (
    Setting(0.1, 0.9),
    Setting(0.01, 0.99),
    Setting(0.02, 0.999),
    Setting(1.5, 0.9),
    Setting(0.1, 0.9, "regression"),
    Setting(0.02, 0.999, "regression"),
)
BEYOND = (
    Setting(0.02, 0.9, "quartic"),
    Setting(0.1, 0.9, "quartic"),
    Setting(0.2, 0.9, "quartic"),
    Setting(0.1, 0.99, burn_in=2),
)


def law(rate, decay):
    """Returns Var(average) / Var(raw), where `rate` is gamma * lambda.

    Example:

    >>> law(1.0, 0.5)  # white noise
    0.3333333333333333
    """
    a = 1 - rate
    return (1 - decay) * (1 + a * decay) / ((1 + decay) * (1 - a * decay))


def measure(setting, chains, samples, seed):
    """Measures the variance ratio on independent chains.

    Args:
        setting: A `Setting`.
        chains: Int, number of chains.
        samples: Int, samples per chain.
        seed: Int.

    Returns:
        Tuple of the ratio and its standard error.
    """
    every = BETWEEN * setting.memory
    first = setting.burn_in * setting.memory
    raw, averaged = np.zeros(chains), np.zeros(chains)
    label = f"{setting.problem}, rate {setting.rate}, decay {setting.decay}"
    rules = [ExponentialAverage(setting.decay)]
    steps = first + (samples - 1) * every
    take_step = setting.step(chains, seed)
    for step, iterate, (average,) in trajectories(
        take_step, np.zeros(chains), rules, steps, every, label
    ):
        if step >= first:
            raw += iterate**2 / samples
            averaged += average**2 / samples
    ratio = averaged.mean() / raw.mean()
    # Standard deviation over chains of a ratio of means, to first order.
    spread = (averaged - ratio * raw).std(ddof=1) / raw.mean()
    return ratio, spread / chains**0.5


def print_table(settings, measured):
    """Prints the formula and the measurements.

    Args:
        settings: List of `Setting`s.
        measured: List of ratios and their standard errors, one per setting.
    """
    rows = []
    for setting, (ratio, error) in zip(settings, measured, strict=True):
        expected = law(setting.rate, setting.decay)
        deviation = ratio / expected - 1
        rows.append(
            [
                setting.problem,
                f"{setting.rate:g}",
                f"{setting.decay:g}",
                f"{setting.burn_in}",
                f"{expected:.5f}",
                f"{ratio:.5f} ± {error:.5f}",
                f"{100 * deviation:+.2f} ± {100 * error / expected:.2f} %",
                "yes" if abs(deviation) <= TARGET else "no",
            ]
        )
    header = ["problem", "gamma lambda", "decay", "burn-in", "formula", "measured", "deviation"]
    print(format_table([*header, "within 3 %"], rows))


def draw(path, measured):
    """Plots the formula against the memory, and the measurements.

    Args:
        path: Path of a .png file.
        measured: List of ratios and their standard errors, one per entry of `SETTINGS`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    memory = np.geomspace(1, 10_000, 200)
    rates = sorted({setting.rate for setting in SETTINGS})
    for rate, colour in zip(rates, COLOURS, strict=False):
        panel.plot(memory, law(rate, 1 - 1 / memory), color=colour, label=f"γλ = {rate:g}")
        for setting, (ratio, error) in zip(SETTINGS, measured, strict=True):
            if setting.rate == rate:
                regression = setting.problem == "regression"
                marker, ink = ("x", "black") if regression else ("o", colour)
                memory_here = 1 / (1 - setting.decay)
                panel.errorbar(memory_here, ratio, 2 * error, color=ink, marker=marker)
    for problem, marker in (("quadratic", "o"), ("regression", "x")):
        panel.plot([], [], color="black", marker=marker, linestyle="", label=problem)
    panel.set_xscale("log")
    panel.set_yscale("log")
    style(panel, "Var(average) / Var(raw): formula and measurement", "memory 1 / (1 - decay)")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=8, help="samples per chain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=pathlib.Path, default="variance_law.png")
    options = parser.parse_args()
    run = options.chains, options.samples, options.seed
    measured = [measure(setting, *run) for setting in SETTINGS]
    # A single sample: later ones would be stationary.
    beyond = [measure(s, run[0], 1 if s.burn_in < 12 else run[1], run[2]) for s in BEYOND]
    print("Var(average) / Var(raw), ± one standard error; burn-in in memories\n")
    print_table(SETTINGS, measured)
    print("\nWhere the formula fails\n")
    print_table(BEYOND, beyond)
    draw(options.plot, measured)
    print(f"\nWritten: {options.plot}")


if __name__ == "__main__":
    main()
