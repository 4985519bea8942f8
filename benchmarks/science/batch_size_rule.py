"""Which decay suits a batch that is kappa times as large: decay**kappa, tested.

    python benchmarks/science/batch_size_rule.py

With a batch kappa times as large, the learning rate scaled by kappa (the linear
scaling rule), `rescale_decay(decay, kappa)` = decay**kappa keeps the average what it
was as a function of the examples seen (Busbridge et al. 2023, How to scale your EMA,
definition 1.2). Two statements, of which the first is exact:

1. Memory. What kappa small steps count together in the average equals what the one
   large step in their place counts, at any time, debiased or not. So the half-life
   in examples is the same; and `ExponentialAverage(decay, update_every=kappa)` is the
   average with decay**kappa of every kappa-th iterate.

2. Dynamics. On a quadratic of curvature lambda, with the same examples in the same
   order, iterates and averages agree up to an error proportional to
   kappa * gamma * lambda: it is the linear scaling of the learning rate that is
   approximate, (1 - gamma * lambda)**kappa against 1 - kappa * gamma * lambda.

Against it stands the same large batch with the decay kept: its half-life in examples
is kappa times as long, so that the average lags kappa times as far behind.
"""

import argparse
import math
import pathlib
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from trajectories import COLOURS, shares, style, trajectories

from polyak_model import ExponentialAverage, rescale_decay
from polyak_model.commands.text_tables import format_table

RATE = 0.005  # gamma * lambda, and the noise of one example has variance 1
DECAY = 0.999
RATIOS = (2, 4, 8, 16)
RATES = (0.02, 0.01, 0.005, 0.0025, 0.00125)


def memory_difference(decay, ratio, steps, debias=True):
    """Returns the largest difference between the two memories, relative to the largest share.

    Args:
        decay: Float, for the small batch.
        ratio: Int, kappa.
        steps: Int, of the large batch.
        debias: Bool, as in `ExponentialAverage`.
    """
    small = shares(ExponentialAverage(decay, debias), steps * ratio)
    large = shares(ExponentialAverage(rescale_decay(decay, ratio), debias), steps)
    together = small.reshape(steps, ratio).sum(axis=1)
    return np.abs(together - large).max() / large.max()


def half_life(decay, batch_ratio):
    """Returns the half-life in examples, where a small batch is one example."""
    return batch_ratio * math.log(0.5) / math.log(decay)


def rare_difference(decay, ratio, steps, seed):
    """Returns the largest difference of rescaled decay and `update_every` on a random walk."""
    walk = np.random.default_rng(seed).normal(size=(steps * ratio, 8)).cumsum(axis=0)
    rare = ExponentialAverage(decay, update_every=ratio)
    *_, (_, _, (one,)) = follow(walk, rare)
    *_, (_, _, (other,)) = follow(walk[ratio - 1 :: ratio], get_rescaled(decay, ratio))
    return np.abs(one - other).max() / np.abs(walk).max()


def get_rescaled(decay, ratio):
    """Returns the rule for a batch `ratio` times as large."""
    return ExponentialAverage(rescale_decay(decay, ratio))


def follow(path, rule):
    """Yields what `trajectories` does, for iterates that are given."""
    path = tf.constant(path)
    steps = len(path)
    return trajectories(lambda _, t: path[t - 1], np.zeros(path.shape[1]), [rule], steps, steps)


def profile(rate, decay, ratio, examples):
    """Solves for the mean and the variance of the average over the examples seen.

    The iterate starts at 1 on a quadratic with its minimum at 0; the average,
    debiased, has no share in the start.

    Args:
        rate: Float, gamma * lambda of the small batch, which is one example.
        decay: Float, of the batch at hand.
        ratio: Int, how many examples are in the batch at hand.
        examples: Int, how many in all.

    Returns:
        Two arrays with an entry per step.
    """
    a = 1 - rate * ratio
    noise = rate**2 * ratio
    weight = ExponentialAverage(decay).weight(np.arange(1, examples // ratio + 1))
    mean_raw = mean_average = 1.0
    var_raw = covariance = var_average = 0.0
    means, variances = np.zeros_like(weight), np.zeros_like(weight)
    for i, c in enumerate(weight):
        mean_raw *= a
        mean_average += c * (mean_raw - mean_average)
        var_raw = a**2 * var_raw + noise
        with_old = a * covariance
        covariance = (1 - c) * with_old + c * var_raw
        var_average = (1 - c) ** 2 * var_average + 2 * c * (1 - c) * with_old + c**2 * var_raw
        means[i], variances[i] = mean_average, var_average
    return means, variances


def profile_difference(rate, decay, ratio, new_decay, examples):
    """Compares mean and variance with those of the small batch at the same examples.

    Args:
        rate: Float, gamma * lambda of the small batch.
        decay: Float, of the small batch.
        ratio: Int, kappa.
        new_decay: Float, of the large batch.
        examples: Int.

    Returns:
        Two floats: the largest difference of the means, the start being 1; and
        the largest difference of the variances, relative to the largest.
    """
    mean, variance = (p[ratio - 1 :: ratio] for p in profile(rate, decay, 1, examples))
    new_mean, new_variance = profile(rate, new_decay, ratio, examples)
    return (
        np.abs(new_mean - mean).max(),
        np.abs(new_variance - variance).max() / variance.max(),
    )


@dataclass(frozen=True)
class Batch:
    """A way to train on the same examples: how many at once, with which decay."""

    name: str
    ratio: int
    decay: float


def simulate(noise, batch, every):
    """Returns the average of each chain after every so many examples.

    Args:
        noise: Array (examples, chains), what each example adds to the optimum.
        batch: A `Batch`.
        every: Int, examples between two reports.
    """
    examples, chains = noise.shape
    target = tf.constant(noise.reshape(-1, batch.ratio, chains).mean(axis=1))
    step_size = RATE * batch.ratio
    return np.stack(
        [
            average
            for _, _, (average,) in trajectories(
                lambda iterate, t: iterate - step_size * (iterate - target[t - 1]),
                np.ones(chains),
                [ExponentialAverage(batch.decay)],
                examples // batch.ratio,
                every // batch.ratio,
                f"{batch.name}, {batch.ratio} examples at once",
            )
        ]
    )


def memory_rows():
    """Returns the rows of the first table: statement 1."""
    rows = []
    for ratio in RATIOS:
        steps = 8192 // ratio
        rows.append(
            [
                f"{ratio}",
                f"{rescale_decay(DECAY, ratio):.6f}",
                f"{half_life(DECAY, 1):.1f}",
                f"{half_life(rescale_decay(DECAY, ratio), ratio):.1f}",
                f"{half_life(DECAY, ratio):.1f}",
                f"{memory_difference(DECAY, ratio, steps):.0e}",
                f"{memory_difference(DECAY, ratio, steps, debias=False):.0e}",
                f"{rare_difference(DECAY, ratio, steps, seed=0):.0e}",
            ]
        )
    return rows


def dynamics_row(batch, averages, base, every):
    """Returns a row of the second table: statement 2, by theory and measured.

    Args:
        batch: A `Batch`.
        averages: Array (reports, chains), of this batch.
        base: The same of the small batch.
        every: Int, examples between two reports.
    """
    reports, chains = base.shape
    examples = reports * every
    mean, variance = (p[every - 1 :: every] for p in profile(RATE, DECAY, 1, examples))
    at = slice(every // batch.ratio - 1, None, every // batch.ratio)
    new_mean, new_variance = (p[at] for p in profile(RATE, batch.decay, batch.ratio, examples))
    worst = np.abs(new_mean - mean).argmax()
    lag = averages[worst] - base[worst]
    square, new_square = ((x[-1] - x[-1].mean()) ** 2 for x in (base, averages))
    ratio = new_square.mean() / square.mean()
    ratio_error = (new_square - ratio * square).std(ddof=1) / square.mean() / chains**0.5
    apart = ((averages - base)[reports // 2 :] ** 2).mean() ** 0.5
    return [
        batch.name,
        f"{batch.ratio}",
        f"{RATE * batch.ratio:g}",
        f"{(new_mean - mean)[worst]:+.4f}",
        f"{lag.mean():+.4f} ± {lag.std(ddof=1) / chains**0.5:.4f}",
        f"{new_variance[-1] / variance[-1]:.4f}",
        f"{ratio:.4f} ± {ratio_error:.4f}",
        f"{apart / variance[-1] ** 0.5:.3f}",
    ]


def order_rows(ratio):
    """Returns the rows of the third table: the error of statement 2 over the rate."""
    rows = []
    for rate in RATES:
        decay, examples = 1 - rate / 5, int(round(40 / rate))
        rescaled = profile_difference(rate, decay, ratio, rescale_decay(decay, ratio), examples)
        kept = profile_difference(rate, decay, ratio, decay, examples)
        small = rate * ratio
        rows.append(
            [
                f"{small:g}",
                *(f"{difference:.5f}" for difference in rescaled),
                *(f"{difference / small:.3f}" for difference in rescaled),
                *(f"{difference:.3f}" for difference in kept),
            ]
        )
    return rows


def draw(path, simulated, every):
    """Draws mean and variance of the average over the examples seen.

    Args:
        path: Where to, a .png file.
        simulated: List of tuples of a `Batch` and its averages.
        every: Int, examples between two reports.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for (batch, averages), colour in zip(simulated, COLOURS, strict=False):
        reports = every * np.arange(1, len(averages) + 1)
        exact = profile(RATE, batch.decay, batch.ratio, reports[-1])
        seen = batch.ratio * np.arange(1, len(exact[0]) + 1)
        measured = averages.mean(axis=1), averages.var(axis=1, ddof=1)
        label = f"{batch.ratio} at once, {batch.name}" if batch.ratio > 1 else "1 at once"
        for panel, line, dots in zip(panels, exact, measured, strict=True):
            panel.plot(seen, line, color=colour, label=label)
            panel.plot(reports, dots, color=colour, marker="o", markersize=3, linestyle="")
    for panel, title in zip(panels, ("Mean", "Variance"), strict=True):
        style(panel, f"{title} of the average", "examples seen")
        panel.set_yscale("log")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=8192, help="a multiple of 256")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=pathlib.Path, default="batch_size_rule.png")
    options = parser.parse_args()
    print(f"1. Memory, exact: decay {DECAY}, differences relative to the largest\n")
    header = ["kappa", "decay**kappa", "half-life, 1 at once", "rescaled", "kept"]
    header += ["memory differs by", "without debias", "update_every differs by"]
    print(format_table(header, memory_rows(), left=0))

    every = 256
    noise = np.random.default_rng(options.seed).normal(size=(options.examples, options.chains))
    base = simulate(noise, Batch("small batch", 1, DECAY), every)
    simulated = []
    for ratio in RATIOS:
        for name, decay in (("rescaled", rescale_decay(DECAY, ratio)), ("kept", DECAY)):
            batch = Batch(name, ratio, decay)
            simulated.append((batch, simulate(noise, batch, every)))
    print(
        f"\n2. Dynamics, approximate: gamma lambda {RATE}, decay {DECAY}, from 1 down to 0, "
        "against the small batch at the same examples\n"
    )
    header = ["decay", "kappa", "kappa gamma lambda", "mean differs by", "measured"]
    header += ["variance ratio", "measured", "paths differ by, in sd"]
    print(format_table(header, [dynamics_row(*pair, base, every) for pair in simulated]))
    print(
        "\nThe error of 2 is of first order: kappa 8, memory of the average five times the "
        "iterate's\n"
    )
    header = ["kappa gamma lambda", "mean", "variance", "mean / rate", "variance / rate"]
    header += ["mean, kept", "variance, kept"]
    print(format_table(header, order_rows(8), left=0))
    draw(options.plot, [(Batch("small batch", 1, DECAY), base), *simulated[-2:]], every)
    print(f"\nWrote {options.plot}")


if __name__ == "__main__":
    main()
