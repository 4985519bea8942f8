"""Tests decay**kappa as the decay for a batch that is kappa times as large.

    python benchmarks/science/batch_size_rule.py

With a batch kappa times as large and the learning rate scaled by kappa (the linear
scaling rule), `rescale_decay(decay, kappa)` = decay**kappa keeps the average the same
function of the number of examples seen (Busbridge et al. 2023, How to scale your EMA,
definition 1.2). Two statements, of which the first is exact:

1. Memory. The total share of kappa small steps in the average equals the share of the
   one large step that replaces them, at any time, debiased or not. So the half-life in
   examples is the same, and `ExponentialAverage(decay, update_every=kappa)` is the
   average with decay**kappa of every kappa-th iterate.

2. Dynamics. On a quadratic of curvature lambda, with the same examples in the same
   order, the averages agree up to an error proportional to kappa * gamma * lambda, for
   two reasons. Linear scaling of the learning rate is itself approximate,
   1 - kappa * gamma * lambda instead of (1 - gamma * lambda)**kappa. And of each kappa
   small steps the average includes only the last iterate. `update_every=kappa` with the
   small batch has only the second error; the table includes it to separate the two.
   The second error causes most of the difference of the means, but has no first-order
   effect on the stationary state.

For comparison, the same large batch with an unchanged decay: its half-life in examples
is kappa times as long, so the average lags kappa times as far behind.
"""

import argparse
import math
import pathlib

import numpy as np
import tensorflow as tf
from batches import Variant, profile_differences, variants
from trajectories import COLOURS, style, trajectories

from polyak_model import ExponentialAverage, rescale_decay
from polyak_model.cli.tables import format_table
from polyak_model.rules import shares

RATE = 0.005  # gamma * lambda, and the noise of one example has variance 1
DECAY = 0.999
RATIOS = (2, 4, 8, 16)
RATES = (0.02, 0.01, 0.005, 0.0025, 0.00125)


def memory_difference(decay, ratio, steps, debias=True):
    """Returns the largest difference between the two sets of shares, relative to the largest share.

    Args:
        decay: Float, decay for the small batch.
        ratio: Int, kappa.
        steps: Int, steps with the large batch.
        debias: Bool, as in `ExponentialAverage`.
    """
    small = shares(ExponentialAverage(decay, debias), steps * ratio)
    large = shares(ExponentialAverage(rescale_decay(decay, ratio), debias), steps)
    together = small.reshape(steps, ratio).sum(axis=1)
    return np.abs(together - large).max() / large.max()


def half_life(decay, batch_ratio):
    """Returns the half-life in examples; a small batch is one example."""
    return batch_ratio * math.log(0.5) / math.log(decay)


def rare_difference(decay, ratio, steps, seed):
    """Returns the largest difference between rescaled decay and `update_every` on a random walk."""
    walk = np.random.default_rng(seed).normal(size=(steps * ratio, 8)).cumsum(axis=0)
    rare = ExponentialAverage(decay, update_every=ratio)
    *_, (_, _, (one,)) = follow(walk, rare)
    *_, (_, _, (other,)) = follow(walk[ratio - 1 :: ratio], get_rescaled(decay, ratio))
    return np.abs(one - other).max() / np.abs(walk).max()


def get_rescaled(decay, ratio):
    """Returns the rule for a batch `ratio` times as large."""
    return ExponentialAverage(rescale_decay(decay, ratio))


def follow(path, rule):
    """Yields what `trajectories` yields, for given iterates."""
    path = tf.constant(path)
    steps = len(path)
    return trajectories(lambda _, t: path[t - 1], np.zeros(path.shape[1]), [rule], steps, steps)


def simulate(noise, ratio, rules, every):
    """Returns the averages of each chain at regular numbers of examples.

    Args:
        noise: Array (examples, chains), the minimum of the loss of each example.
        ratio: Int, examples per batch.
        rules: List of rules.
        every: Int, examples between two reports.

    Returns:
        Array (rules, reports, chains).
    """
    examples, chains = noise.shape
    target = tf.constant(noise.reshape(-1, ratio, chains).mean(axis=1))
    reports = trajectories(
        lambda iterate, t: iterate - RATE * ratio * (iterate - target[t - 1]),
        np.ones(chains),
        rules,
        examples // ratio,
        every // ratio,
        f"{ratio} examples per batch",
    )
    return np.stack([averages for _, _, averages in reports], axis=1)


def simulate_all(noise, every):
    """Returns the averages of the small batch and a list of (variant, its averages)."""
    rare = [ExponentialAverage(DECAY, update_every=ratio) for ratio in RATIOS]
    base, *rares = simulate(noise, 1, [ExponentialAverage(DECAY), *rare], every)
    simulated = []
    for ratio, averages in zip(RATIOS, rares, strict=True):
        first, *others = variants(DECAY, ratio)
        rules = [ExponentialAverage(variant.decay) for variant in others]
        simulated.append((first, averages))
        simulated.extend(zip(others, simulate(noise, ratio, rules, every), strict=True))
    return base, simulated


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


def dynamics_row(variant, averages, base, every):
    """Returns a row of the second table: statement 2, predicted and measured.

    Args:
        variant: A `Variant`.
        averages: Array (reports, chains), averages of this variant.
        base: The same for the small batch.
        every: Int, examples between two reports.
    """
    reports, chains = base.shape
    small = Variant("small", 1, DECAY)
    (mean, variance), (new_mean, new_variance) = (
        [p[every // v.ratio - 1 :: every // v.ratio] for p in v.profile(RATE, reports * every)]
        for v in (small, variant)
    )
    worst = np.abs(new_mean - mean).argmax()
    lag = averages[worst] - base[worst]
    square, new_square = ((x[-1] - x[-1].mean()) ** 2 for x in (base, averages))
    ratio = new_square.mean() / square.mean()
    ratio_error = (new_square - ratio * square).std(ddof=1) / square.mean() / chains**0.5
    apart = ((averages - base)[reports // 2 :] ** 2).mean() ** 0.5
    return [
        variant.name,
        f"{variant.ratio}",
        f"{(new_mean - mean)[worst]:+.5f}",
        f"{lag.mean():+.5f} ± {lag.std(ddof=1) / chains**0.5:.5f}",
        f"{new_mean[-1]:.5f}",
        f"{new_variance[-1] / variance[-1]:.4f}",
        f"{ratio:.4f} ± {ratio_error:.4f}",
        f"{apart / variance[-1] ** 0.5:.3f}",
    ]


def order_rows(ratio):
    """Returns the rows of the third table: the error of statement 2 as a function of the rate."""
    rows = []
    for name in ("update_every", "rescaled", "kept"):
        for rate in RATES:
            decay = 1 - rate / 5
            (variant,) = (v for v in variants(decay, ratio) if v.name == name)
            differences = profile_differences(variant, rate, decay, round(40 / rate))
            small = rate * ratio
            over = [f"{difference / small:.3f}" for difference in differences]
            rows.append([name, f"{small:g}", *(f"{d:.5f}" for d in differences), *over])
    return rows


def draw(path, simulated, every):
    """Plots mean and variance of the average against the number of examples seen.

    Args:
        path: Path of a .png file.
        simulated: List of tuples of a `Variant` and its averages.
        every: Int, examples between two reports.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for (variant, averages), colour in zip(simulated, COLOURS, strict=False):
        reports = every * np.arange(1, len(averages) + 1)
        exact = variant.profile(RATE, reports[-1])
        seen = variant.ratio * np.arange(1, len(exact[0]) + 1)
        measured = averages.mean(axis=1), averages.var(axis=1, ddof=1)
        for panel, line, dots in zip(panels, exact, measured, strict=True):
            panel.plot(seen, line, color=colour, label=f"batch of {variant.ratio}, {variant.name}")
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
    header = ["kappa", "decay**kappa", "half-life, batch of 1", "rescaled", "kept"]
    header += ["memory difference", "without debias", "update_every difference"]
    print(format_table(header, memory_rows(), left=0))

    every = 256
    noise = np.random.default_rng(options.seed).normal(size=(options.examples, options.chains))
    base, simulated = simulate_all(noise, every)
    print(
        f"\n2. Dynamics, approximate: gamma lambda {RATE}, decay {DECAY}, start 1, minimum 0, "
        "compared with the small batch at the same examples, ± one standard error\n"
    )
    header = ["decay", "kappa", "mean difference", "measured", "final mean"]
    header += ["variance ratio", "measured", "path difference, sd"]
    print(format_table(header, [dynamics_row(*pair, base, every) for pair in simulated]))
    print(
        "\nThe error of 2 is of first order: kappa 8, memory of the average five times that of "
        "the iterate; largest differences of the means and of the variances from the start, "
        "difference of the final variances, and the same divided by kappa gamma lambda\n"
    )
    header = ["decay", "kappa gamma lambda", "mean", "variance", "final"]
    header += ["mean /", "variance /", "final /"]
    print(format_table(header, order_rows(8)))
    draw(options.plot, [(Variant("decay unchanged", 1, DECAY), base), *simulated[-2:]], every)
    print(f"\nWritten: {options.plot}")


if __name__ == "__main__":
    main()
