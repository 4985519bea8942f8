"""The uniform average of SGD is as good as the best estimator, whatever the step size.

    python benchmarks/science/polyak_juditsky.py

With steps gamma_0 * t**-0.6, H the Hessian and S the covariance of the gradients
at the optimum, the covariance of the uniform average of n iterates approaches
V / n with V = H^-1 S H^-1, that of the last iterate gamma_n * Sigma with
H Sigma + Sigma H = S (Polyak & Juditsky 1992, theorem 2; Fabian 1968). The average
of the last half has twice V / n, and polynomial-decay averaging with eta has
(eta + 1)**2 / (2 * eta + 1) times V / n, the integral of its squared profile.

The choices, made beforehand: gamma_0 = 1 / (2 * the largest eigenvalue of H), so
that with five standard normal inputs SGD contracts in mean square from the third
step on (gamma_t < 2 / (tr H + 2 * lambda_max)); the descent starts at 0, one unit
from the optimum. The noise of the linear regression has the variance
(1 + x_1**2) / 2, so that S is no multiple of H.

The column `this n` is the same quantity by theory for this many steps: the linear
recursion e += -gamma_t * (H e - noise) with noise of covariance S, summed exactly.
"""

import argparse
import pathlib
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from trajectories import COLOURS, shares, style, trajectories

from polyak_model import ExponentialAverage, PolynomialAverage, UniformAverage
from polyak_model.commands.text_tables import format_table

EXPONENT = 0.6
ETA = 3
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Regression:
    """A regression with normal inputs: how to draw a gradient, and its H and S.

    Attributes:
        name: String.
        optimum: Array, the true parameters.
        scales: Array, the standard deviation of each input.
        hessian: Array, H at the optimum.
        noise: Array, S, the covariance of the gradients at the optimum.
        residual: Callable from the linear predictor, its true value, the inputs
            and a standard normal draw to the derivative of the loss by the
            predictor.
    """

    name: str
    optimum: np.ndarray
    scales: np.ndarray
    hessian: np.ndarray
    noise: np.ndarray
    residual: object

    @property
    def covariance(self):
        """V, n times the covariance of the best estimate from n examples."""
        inverse = np.linalg.inv(self.hessian)
        return inverse @ self.noise @ inverse

    @property
    def first_step_size(self):
        """gamma_0."""
        return 1 / (2 * np.linalg.eigvalsh(self.hessian).max())

    def step(self, replicas, seed):
        """Returns the function from an iterate and a step to the next iterate."""
        shape = (replicas, len(self.optimum) + 1)
        optimum, scales = tf.constant(self.optimum), tf.constant(self.scales)

        def take_step(iterate, t):
            key = tf.stack([tf.constant(seed, "int64"), t])
            draws = tf.random.stateless_normal(shape, key, dtype="float64")
            x, draw = draws[:, :-1] * scales, draws[:, -1]
            predictor, truth = tf.reduce_sum(x * iterate, 1), tf.reduce_sum(x * optimum, 1)
            gradient = x * self.residual(predictor, truth, x, draw)[:, None]
            return iterate - self.first_step_size * tf.cast(t, "float64") ** -EXPONENT * gradient

        return take_step


def unit_vector(size):
    """Returns the vector of length 1 with equal entries."""
    return np.full(size, size**-0.5)


def linear_regression(size=5):
    """Inputs of covariance 1, noise of the variance (1 + x_1**2) / 2."""
    noise = np.eye(size)
    noise[0, 0] = 2  # E[(1 + x**2) / 2 * x**2], where E[x**4] = 3
    return Regression(
        "linear regression",
        unit_vector(size),
        np.ones(size),
        np.eye(size),
        noise,
        lambda predictor, truth, x, draw: (
            predictor - truth - draw * tf.sqrt((1 + x[:, 0] ** 2) / 2)
        ),
    )


def logistic_regression(size=5):
    """Inputs of covariance 1, labels drawn from the model: S = H, by quadrature."""
    optimum = unit_vector(size)
    nodes, mass = np.polynomial.hermite_e.hermegauss(200)
    slope = mass / mass.sum() / (2 + 2 * np.cosh(nodes))
    across, along = slope.sum(), (slope * nodes**2).sum()
    hessian = across * np.eye(size) + (along - across) * np.outer(optimum, optimum)

    def residual(predictor, truth, x, draw):
        # A standard normal draw below this quantile has the probability of the label 1.
        label = tf.cast(0.5 * tf.math.erfc(-draw * 2**-0.5) < tf.sigmoid(truth), "float64")
        return tf.sigmoid(predictor) - label

    return Regression("logistic regression", optimum, np.ones(size), hessian, hessian, residual)


def ill_conditioned_regression(eigenvalues=(1.0, 0.1, 0.01, 0.001, 0.0001)):
    """Linear regression with inputs of these variances, noise of variance 1."""
    hessian = np.diag(eigenvalues)
    return Regression(
        "ill-conditioned linear regression",
        np.ones(len(eigenvalues)),
        np.sqrt(eigenvalues),
        hessian,
        hessian,
        lambda predictor, truth, x, draw: predictor - truth - draw,
    )


def estimators(steps):
    """Returns the rules under test by name; of the raw iterate, the average that forgets all."""
    return {
        "uniform": UniformAverage(),
        "raw": ExponentialAverage(0.0),
        "last half": UniformAverage(start_step=steps // 2),
        f"polynomial {ETA}": PolynomialAverage(ETA),
    }


def limits(regression, steps):
    """Returns n * tr Cov / tr V of each estimator for many steps, and the ratio allowed to it."""
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


def finite_run(rules, step_size, eigenvalues, steps):
    """Solves the linear recursion for an average of exactly so many steps.

    The error e follows e += -gamma_t * (lambda * e - noise_t), the noise having
    variance 1, from e = 1 on.

    Args:
        rules: List of r rules.
        step_size: Float, gamma_0.
        eigenvalues: Array of k values of lambda.
        steps: Int, n.

    Returns:
        Two arrays of shape (r, k), the variance and the mean of the average.
    """
    share = np.stack([shares(rule, steps) for rule in rules])
    gamma = step_size * np.arange(1, steps + 1.0) ** -EXPONENT
    # What a unit of error right after step t contributes to the average.
    effect = np.zeros((len(rules), len(eigenvalues)))
    variance = np.zeros_like(effect)
    for t in reversed(range(steps)):
        effect += share[:, t, None]
        variance += (gamma[t] * effect) ** 2
        effect *= 1 - gamma[t] * eigenvalues
    return variance, effect


def predicted_ratios(regression, steps):
    """Returns n * tr Cov / tr V of each estimator after exactly so many steps, by theory."""
    values, vectors = np.linalg.eigh(regression.hessian)
    noise = np.diag(vectors.T @ regression.noise @ vectors)
    rules = estimators(steps)
    variance, _ = finite_run(list(rules.values()), regression.first_step_size, values, steps)
    ratios = steps * (variance * noise).sum(axis=1) / np.trace(regression.covariance)
    return dict(zip(rules, ratios, strict=True))


def simulate(regression, steps, replicas, seed, reports=40):
    """Returns the errors of each estimator at some steps: a dict of lists of (step, errors)."""
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


def covered(regression, steps, errors):
    """Tells for each entry whether its 95 % confidence interval holds the truth, as 0 or 1."""
    deviation = np.sqrt(np.diag(regression.covariance) / steps)
    return (np.abs(errors) <= NORMAL_95 * deviation).astype("float64")


def efficiency_rows(regression, steps, errors):
    """Returns the rows of the first table for one problem."""
    predicted = predicted_ratios(regression, steps)
    rows = []
    for name, (limit, (low, high)) in limits(regression, steps).items():
        final = errors[name][-1][1]
        ratio, error = efficiency(regression, steps, final)
        bias = steps * (final.mean(axis=0) ** 2).sum() / np.trace(regression.covariance)
        rows.append(
            [
                regression.name,
                f"{steps:,}",
                name,
                f"{limit:.3f}",
                f"{predicted[name]:.3f}",
                f"{ratio:.3f} ± {error:.3f}",
                f"{ratio / limit:.3f}",
                f"{low:.2f} to {high:.2f}",
                "yes" if low <= ratio / limit <= high else "no",
                f"{bias:.3f}",
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


def direction_rows(regression, steps, errors):
    """Returns the rows of the third table: the uniform average in each direction of H."""
    eigenvalues = np.diag(regression.hessian)
    rate = regression.first_step_size
    variance, mean = finite_run([UniformAverage()], rate, eigenvalues, steps)
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
    """Draws the efficiency of the raw iterate and of the uniform average over the steps.

    Args:
        path: Where to, a .png file.
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
    """Prints the efficiency of each estimator, then how often confidence intervals hold."""
    header = ["problem", "n", "estimator", "limit", "this n", "measured", "of limit"]
    header += ["target", "met", "bias"]
    rows = [row for p, e in problems for row in efficiency_rows(p, steps, e)]
    print(format_table(header, rows, left=3))
    print("\n95 % confidence intervals of covariance V / n around the uniform average\n")
    header = ["problem", "n", "cover", "target", "met"]
    print(format_table(header, [coverage_row(p, steps, e) for p, e in problems]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="n, a multiple of 1,000")
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
    hard_errors = simulate(hard, options.steps, **run)

    print("n tr Cov / tr V, ± one standard error over the replicas\n")
    print_efficiency(problems, options.steps)
    print("\nWhere it fails: a short run\n")
    print_efficiency(brief, short)
    print("\nWhere it fails: small eigenvalues, the uniform average direction by direction\n")
    header = ["eigenvalue", "memory / n", "n Var / V, this n", "measured"]
    header += ["n bias² / V, this n", "measured", "95 % covers"]
    print(format_table(header, direction_rows(hard, options.steps, hard_errors), left=0))
    draw(options.plot, problems)
    print(f"\nWrote {options.plot}")


if __name__ == "__main__":
    main()
