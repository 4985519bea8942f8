"""The uniform average of SGD is an asymptotically optimal estimate.

    python benchmarks/science/polyak_juditsky.py

Let the step sizes be gamma_0 * t**-0.6, H the Hessian and S the covariance of the
gradients at the optimum. The covariance of the uniform average of n iterates approaches
V / n with V = H^-1 S H^-1, and that of the last iterate gamma_n * Sigma with
H Sigma + Sigma H = S (Polyak & Juditsky 1992, Acceleration of stochastic approximation
by averaging; Fabian 1968, On asymptotic normality in stochastic approximation). The
average of the last half approaches twice V / n, and polynomial-decay averaging with eta
(eta + 1)**2 / (2 * eta + 1) times V / n, the integral of its squared profile.

Choices made in advance: gamma_0 = 1 / (2 * the largest eigenvalue of H), so that the
linear regression on five standard normal inputs contracts in mean square from the third
step on (gamma_t < 2 / (tr H + 2 * lambda_max)). The descent starts at 0, one unit from
the optimum. The noise of the linear regression has variance (1 + x_1**2) / 2, so that S
is not a multiple of H. All problems use the same seed, so their deviations are
correlated.

The columns `this n` are predictions for this number of steps: the linear recursion
e += -gamma_t * (H e - noise) with noise of covariance S, summed exactly. The bias also
includes the shift of the mean by -gamma_t * H^-1 f'''[Sigma] / 2 if H changes around
the optimum. This is the bias of the logistic regression: its n * |bias|**2 decreases
only like n**-0.2. The predictions ignore that gradients are noisier far from the
optimum. The script also shows where the theory fails: short runs, small eigenvalues of
H, and first steps that are too small or too large.
"""

import argparse
import pathlib
from dataclasses import replace

import numpy as np
from recursion import finite_run, predict
from regressions import (
    EXPONENT,
    ill_conditioned_regression,
    linear_regression,
    logistic_regression,
)
from trajectories import COLOURS, style, trajectories

from polyak_model import ExponentialAverage, PolynomialAverage, UniformAverage
from polyak_model.cli.tables import format_table
from polyak_model.rules import shares

ETA = 3
FIRST_RATES = (1 / 32, 1 / 8, 1 / 2, 2)
NORMAL_95 = 1.959963984540054


def estimators(steps):
    """Returns the rules under test by name; decay 0 gives the raw iterate."""
    return {
        "uniform": UniformAverage(),
        "raw": ExponentialAverage(0.0),
        "last half": UniformAverage(start_step=steps // 2),
        f"polynomial {ETA}": PolynomialAverage(ETA),
    }


def limits(regression, steps):
    """Returns the limit of n * tr Cov / tr V of each estimator, and its tolerance as a ratio."""
    values, vectors = np.linalg.eigh(regression.hessian)
    noise = np.diag(vectors.T @ regression.noise @ vectors)
    step_size = regression.first_step_size * steps**-EXPONENT
    raw = steps * step_size * (noise / (2 * values)).sum() / np.trace(regression.covariance)
    polynomial = (ETA + 1) ** 2 / (2 * ETA + 1)
    return {
        "uniform": (1.0, (0.9, 1.2)),
        "raw": (raw, (0.85, 1.15)),
        "last half": (2.0, (0.85, 1.15)),
        f"polynomial {ETA}": (polynomial, (0.8, 1.2)),
    }


def simulate(regression, steps, replicas, seed, reports=40):
    """Returns the errors of each estimator: a dict of lists of (step, errors)."""
    rules = estimators(steps)
    start = np.zeros((replicas, len(regression.optimum)))
    errors = {name: [] for name in rules}
    for step, _, averages in trajectories(
        regression.step(replicas, seed),
        start,
        list(rules.values()),
        steps,
        every=steps // reports,
        label=f"{regression.name}, {steps:,} steps",
    ):
        for name, average in zip(rules, averages, strict=True):
            errors[name].append((step, average - regression.optimum))
    return errors


def mean_and_error(samples):
    """Returns the mean over replicas and its standard error."""
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / len(samples) ** 0.5


def efficiency(regression, steps, errors):
    """Returns n * tr Cov / tr V and its standard error over replicas."""
    centred = errors - errors.mean(axis=0)
    squares = (centred**2).sum(axis=1) * len(errors) / (len(errors) - 1)
    return mean_and_error(steps * squares / np.trace(regression.covariance))


def bias(regression, steps, errors):
    """Returns n * |E[error]|**2 / tr V and its standard error, by the jackknife."""
    replicas = len(errors)
    mean = errors.mean(axis=0)
    without_one = ((replicas * mean - errors) / (replicas - 1)) ** 2
    squares = without_one.sum(axis=1)
    unbiased = replicas * (mean**2).sum() - (replicas - 1) * squares.mean()
    scale = steps / np.trace(regression.covariance)
    return scale * unbiased, scale * (replicas - 1) ** 0.5 * squares.std()


def covered(regression, steps, errors):
    """Returns, as 0 or 1, whether the 95 % confidence interval of each entry covers the truth."""
    deviation = np.sqrt(np.diag(regression.covariance) / steps)
    return (np.abs(errors) <= NORMAL_95 * deviation).astype("float64")


def in_text(value, error):
    """Formats a value and its standard error."""
    return f"{value:.3f} ± {error:.3f}"


def efficiency_rows(regression, steps, errors):
    """Returns the rows of the first table for one problem."""
    predicted = zip(*predict(regression, list(estimators(steps).values()), steps), strict=True)
    rows = []
    for (name, (limit, (low, high))), (this_n, bias_this_n) in zip(
        limits(regression, steps).items(), predicted, strict=True
    ):
        final = errors[name][-1][1]
        ratio, error = efficiency(regression, steps, final)
        rows.append(
            [
                regression.name,
                f"{steps:,}",
                name,
                f"{limit:.3f}",
                f"{this_n:.3f}",
                in_text(ratio, error),
                f"{ratio / limit:.3f}",
                f"{low:.2f} to {high:.2f}",
                "yes" if low <= ratio / limit <= high else "no",
                f"{bias_this_n:.3f}",
                in_text(*bias(regression, steps, final)),
            ]
        )
    return rows


def coverage_row(regression, steps, errors):
    """Returns the row of the second table for one problem."""
    final = errors["uniform"][-1][1]
    share, error = mean_and_error(covered(regression, steps, final).mean(axis=1))
    met = "yes" if 0.93 <= share <= 0.96 else "no"
    covers = f"{100 * share:.1f} ± {100 * error:.1f} %"
    return [regression.name, f"{steps:,}", covers, "93 to 96 %", met]


def first_step_row(regression, steps, errors):
    """Returns the row of the table of first step sizes for one problem and gamma_0."""
    final = errors["uniform"][-1][1]
    share, error = mean_and_error(covered(regression, steps, final).mean(axis=1))
    (ratio,), (squared_bias,) = predict(regression, [UniformAverage()], steps)
    return [
        regression.name,
        f"{steps:,}",
        f"{regression.first_rate:g}",
        f"{ratio:.3f}",
        in_text(*efficiency(regression, steps, final)),
        f"{squared_bias:.3f}",
        in_text(*bias(regression, steps, final)),
        f"{100 * share:.1f} ± {100 * error:.1f} %",
    ]


def direction_rows(regression, steps, errors):
    """Returns the rows of the table of directions: the uniform average per eigenvalue."""
    eigenvalues = np.diag(regression.hessian)
    rate = regression.first_step_size
    step_size = rate * np.arange(1, steps + 1.0) ** -EXPONENT
    variance, mean = finite_run(shares(UniformAverage(), steps)[None], step_size, eigenvalues)
    final = errors["uniform"][-1][1]
    scale = steps / np.diag(regression.covariance)
    _, deviations = mean_and_error((final - final.mean(axis=0)) ** 2 * scale)
    coverages = covered(regression, steps, final)
    rows = []
    for i, eigenvalue in enumerate(eigenvalues):
        rows.append(
            [
                f"{eigenvalue:g}",
                f"{steps**EXPONENT / (rate * eigenvalue) / steps:.3g}",
                f"{scale[i] * regression.noise[i, i] * variance[0, i]:.3g}",
                f"{scale[i] * final[:, i].var(ddof=1):.3g} ± {deviations[i]:.1g}",
                f"{scale[i] * (regression.optimum[i] * mean[0, i]) ** 2:.3g}",
                f"{scale[i] * final[:, i].mean() ** 2:.3g}",
                f"{100 * coverages[:, i].mean():.1f} %",
            ]
        )
    return rows


def draw(path, problems):
    """Plots the efficiency of the raw iterate and of the uniform average against the step.

    Args:
        path: Path of a .png file.
        problems: List of tuples of a regression and its errors.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(problems), sharey=True)
    for panel, (regression, errors) in zip(panels, problems, strict=True):
        for name, colour in zip(("raw", "uniform"), COLOURS, strict=False):
            steps = np.array([step for step, _ in errors[name]])
            ratios, spread = zip(
                *(efficiency(regression, step, error) for step, error in errors[name]), strict=True
            )
            panel.errorbar(steps, ratios, 2 * np.array(spread), color=colour, label=name)
        panel.plot(
            steps,
            [limits(regression, step)["raw"][0] for step in steps],
            color="black",
            linestyle=":",
            label="limits",
        )
        panel.axhline(1, color="black", linestyle=":")
        panel.set_yscale("log")
        style(panel, regression.name.capitalize(), "step n")
    panels[0].set_ylabel("n tr Cov / tr V")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def print_efficiency(problems, steps):
    """Prints the efficiency of each estimator, then the coverage of confidence intervals."""
    header = ["problem", "n", "estimator", "limit", "this n", "measured", "/ limit"]
    header += ["target", "met", "n bias² / tr V, this n", "measured"]
    rows = [row for p, e in problems for row in efficiency_rows(p, steps, e)]
    print(format_table(header, rows, left=3))
    print("\n95 % confidence intervals of covariance V / n around the uniform average\n")
    header = ["problem", "n", "coverage", "target", "met"]
    print(format_table(header, [coverage_row(p, steps, e) for p, e in problems]))


def print_directions(problem, steps, errors):
    """Prints results for the uniform average in the direction of each eigenvalue."""
    header = ["eigenvalue", "memory / n", "n Var / V, this n", "measured"]
    header += ["n bias² / V, this n", "measured", "coverage"]
    print(format_table(header, direction_rows(problem, steps, errors), left=0))


def print_first_steps(problems, steps):
    """Prints results for the uniform average with other first step sizes."""
    header = ["problem", "n", "gamma_0 lambda_max", "n tr Cov / tr V, this n", "measured"]
    header += ["n bias² / tr V, this n", "measured", "coverage"]
    print(format_table(header, [first_step_row(p, steps, e) for p, e in problems]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="n, a multiple of 4,000")
    parser.add_argument("--replicas", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=pathlib.Path, default="polyak_juditsky.png")
    options = parser.parse_args()
    run = {"replicas": options.replicas, "seed": options.seed}
    short = options.steps // 100
    regressions = linear_regression(), logistic_regression()
    problems = [(problem, simulate(problem, options.steps, **run)) for problem in regressions]
    brief = [(problem, simulate(problem, short, **run)) for problem in regressions]
    hard = ill_conditioned_regression()
    hard_errors = simulate(hard, options.steps, **run, reports=1)
    middle = options.steps // 10
    others = [replace(p, first_rate=rate) for p in regressions for rate in FIRST_RATES]
    varied = [(p, simulate(p, middle, **run, reports=1)) for p in others]

    print("n tr Cov / tr V, ± one standard error over the replicas\n")
    print_efficiency(problems, options.steps)
    print("\nWhere the theory fails: a short run\n")
    print_efficiency(brief, short)
    print("\nWhere the theory fails: small eigenvalues, the uniform average by direction\n")
    print_directions(hard, options.steps, hard_errors)
    print("\nWhere the theory fails: the first step size, the uniform average\n")
    print_first_steps(varied, middle)
    draw(options.plot, problems)
    print(f"\nWritten: {options.plot}")


if __name__ == "__main__":
    main()
