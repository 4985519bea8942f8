"""How much noise the exponential average removes at a constant step: a law, measured.

    python benchmarks/science/variance_law.py

On a quadratic of curvature lambda, SGD with the constant step gamma ends as an
autoregression with a = 1 - gamma * lambda, and its exponential average of decay
rho has, against the raw iterate, the variance

    Var(average) / Var(raw) = (1 - rho) (1 + a rho) / ((1 + rho) (1 - a rho)),

the sum over all pairs of iterates of their shares in the average times their
autocorrelation a**|i-j|. (Averaging SGD at a constant step: Mandt et al. 2017,
Stochastic gradient descent as approximate Bayesian inference.) It asks nothing of
the noise but that its mean be zero given the past: it holds for noise added to the
gradient as for one-example gradients of a regression, whose noise grows with the
error.

The chains start at the optimum, and are looked at after twelve times the longer of
the two memories, and every two memories from then on.
"""

import argparse
import math
import pathlib
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from trajectories import COLOURS, shares, style, trajectories

from polyak_model import ExponentialAverage
from polyak_model.commands.text_tables import format_table

TARGET = 0.03
BURN_IN = 12
BETWEEN = 2


@dataclass(frozen=True)
class Setting:
    """A quadratic with its noise, and a decay.

    Attributes:
        rate: Float, gamma * lambda.
        decay: Float, rho.
        noise: `"added"`: standard normal, added to the gradient; or `"example"`:
            the gradient of a linear regression at one example, with a uniform
            input of variance 1 and standard normal noise.
    """

    rate: float
    decay: float
    noise: str = "added"

    @property
    def memory(self):
        """Int, steps in which both the iterate and the average forget all but 1 / e."""
        memories = [1 / (1 - abs(1 - self.rate)), 1 / (1 - self.decay)]
        return math.ceil(max(memories))

    def step(self, chains, seed):
        """Returns the function from an iterate and a step to the next iterate."""

        def draw(kind, t, number):
            key = tf.stack([tf.constant(seed, "int64"), 2 * t + number])
            if kind == "normal":
                return tf.random.stateless_normal([chains], key, dtype="float64")
            return tf.random.stateless_uniform(
                [chains], key, minval=-(3**0.5), maxval=3**0.5, dtype="float64"
            )

        def take_step(iterate, t):
            if self.noise == "added":
                return iterate - self.rate * (iterate - draw("normal", t, 0))
            x = draw("uniform", t, 1)
            return iterate - self.rate * x * (x * iterate - draw("normal", t, 0))

        return take_step


SETTINGS = (
    Setting(0.1, 0.9),
    Setting(0.01, 0.99),
    Setting(0.02, 0.999),
    Setting(1.5, 0.9),
    Setting(0.1, 0.9, "example"),
    Setting(0.02, 0.999, "example"),
)


def law(rate, decay):
    """Returns Var(average) / Var(raw), where `rate` is gamma * lambda.

    Example:

    >>> law(1.0, 0.5)  # white noise
    0.3333333333333333
    """
    a = 1 - rate
    return (1 - decay) * (1 + a * decay) / ((1 + decay) * (1 - a * decay))


def summed_ratio(rate, decay, steps):
    """Returns the same from the weights that the rule gives to `steps` stationary iterates."""
    share = shares(ExponentialAverage(decay), steps)
    ages = np.arange(steps)
    return share @ (1 - rate) ** np.abs(ages[:, None] - ages) @ share


def measure(setting, chains, samples, seed):
    """Measures the ratio on independent chains.

    Args:
        setting: A `Setting`.
        chains: Int, how many.
        samples: Int, at how many times each is looked at.
        seed: Int.

    Returns:
        Tuple of the ratio and its standard error.
    """
    every = BETWEEN * setting.memory
    first = BURN_IN * setting.memory
    raw, averaged = np.zeros(chains), np.zeros(chains)
    label = f"rate {setting.rate}, decay {setting.decay}, noise {setting.noise}"
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
    # The spread over chains of a ratio of means, to first order.
    spread = (averaged - ratio * raw).std(ddof=1) / raw.mean()
    return ratio, spread / chains**0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=8, help="times each chain is looked at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=pathlib.Path, default="variance_law.png")
    options = parser.parse_args()
    measured = [measure(s, options.chains, options.samples, options.seed) for s in SETTINGS]
    rows = []
    for setting, (ratio, error) in zip(SETTINGS, measured, strict=True):
        expected = law(setting.rate, setting.decay)
        deviation = ratio / expected - 1
        rows.append(
            [
                setting.noise,
                f"{setting.rate:g}",
                f"{setting.decay:g}",
                f"{expected:.5f}",
                f"{ratio:.5f} ± {error:.5f}",
                f"{100 * deviation:+.2f} ± {100 * error / expected:.2f} %",
                "yes" if abs(deviation) <= TARGET else "no",
            ]
        )
    print("Var(average) / Var(raw), ± one standard error\n")
    header = ["noise", "gamma lambda", "decay", "law", "measured", "deviation", "within 3 %"]
    print(format_table(header, rows))
    draw(options.plot, measured)
    print(f"\nWrote {options.plot}")


def draw(path, measured):
    """Draws the law over the decay, and what was measured.

    Args:
        path: Where to, a .png file.
        measured: List of ratios and their standard errors, one for each of `SETTINGS`.
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
                marker = "o" if setting.noise == "added" else "x"
                panel.errorbar(
                    1 / (1 - setting.decay), ratio, 2 * error, color=colour, marker=marker
                )
    panel.set_xscale("log")
    panel.set_yscale("log")
    style(panel, "Var(average) / Var(raw): law and measurement", "memory 1 / (1 - decay), in steps")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
