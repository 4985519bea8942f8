"""Rounding error of an average after 100,000 steps, relative to float64.

    python benchmarks/precision.py
    python benchmarks/precision.py --every 100

Claims: with `compensated=True` the relative error stays below 1e-7, including the
rounding of the result to float32, whether the raw weights keep moving or stop.
Without it, the error stays below 2e-5 while they move. Once they stop, a float32
average stalls before it reaches them, at a distance of half a unit in its last place
divided by the weight of a step. With `update_every=100` the weight of a step is about
a hundred times as large, and the error stays below 2e-5.

The raw weights are those of SGD on a noisy quadratic: a value plus noise. They move
throughout, or only for the first fifth, after which the learning rate is 0. Keras's
SGD takes the steps and keeps its own average with `use_ema=True`, by the formula
`momentum * average + (1 - momentum) * w`. The relative error is
max|average - exact| / max|exact| over all weights of a run, where exact is the
weighted sum of the iterates in float64 with the specified decay (for Keras, the sum
that its formula defines, which starts from the first iterate).

Theory, next to the measurement: each step rounds the average by at most half a unit
in the last place, and later steps keep `1 - c` of that error. Errors of the same sign
add up to `half a unit * sum(kept)`, for a constant weight `half a unit / c`. There the
average stalls: a step `c * (w - average)` below half a unit changes nothing.
Independent rounding errors add up like a random walk, to a standard deviation of
`unit * sqrt(sum(kept**2) / 12)`.

Source: Higham 2002, Accuracy and stability of numerical algorithms, chapter 4;
Kahan 1965, Further remarks on reducing truncation errors.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage
from polyak_model.cli.tables import format_table

LEARNING_RATE = 0.1
GRADIENT_NOISE = 0.5
STOPS_AFTER = {"keep moving": 1.0, "stop after a fifth": 0.2}
COLOURS = {"float32": "#d55e00", "compensated": "#0072b2", "Keras use_ema": "#009e73"}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--decays", type=float, nargs="+", default=[0.999, 0.9999, 0.99999, 1.0])
    parser.add_argument("--every", type=int, default=1, help="`update_every` of the rules")
    parser.add_argument("--weights", type=int, default=200, help="weights per run")
    parser.add_argument("--runs", type=int, default=5, help="independent runs, computed together")
    parser.add_argument("--graph", action="store_true", help="without XLA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="precision.png")
    options = parser.parse_args(arguments)
    cases = [(decay, regime) for regime in STOPS_AFTER for decay in options.decays]
    results = {}
    for number, (decay, regime) in enumerate(cases, start=1):
        progress = f"{number} of {len(cases)}: {name_of(decay)}, raw weights {regime}"
        print(progress, file=sys.stderr, flush=True)
        results[regime, decay] = measure(decay, regime, options)
    print(
        f"{options.steps:,} steps, update_every={options.every}, {options.runs} runs of "
        f"{options.weights:,} weights, {'graph' if options.graph else 'XLA'}, seed {options.seed}."
        "\nRelative error in the maximum norm: mean ± standard deviation over the runs at the "
        "end, and the largest at any step.\n"
    )
    print(format_results(results))
    draw(options.plot, results)
    return results


def name_of(decay):
    return "uniform mean" if decay == 1 else f"decay {decay}"


def measure(decay, regime, options):
    """Averages the raw weights of several runs with each method.

    Args:
        decay: Float, 1 for the uniform mean.
        regime: A key of `STOPS_AFTER`.
        options: The parsed arguments.

    Returns:
        A dict: `steps`, at which errors were measured; `errors`, for each method an
        array with a row per measured step and a column per run; and the predictions
        for the end, `random` and `bound`.
    """
    every = options.every
    if decay == 1:
        rule = UniformAverage(update_every=every)
    else:
        rule = ExponentialAverage(decay, update_every=every)
    generator = np.random.default_rng(options.seed)
    value = generator.normal(size=(options.weights, options.runs)).astype("float32")
    inner = keras.Sequential(
        [keras.Input((options.weights,)), keras.layers.Dense(options.runs, use_bias=False)]
    )
    inner.set_weights([value])
    plain, compensated = (PolyakModel(inner, rule, compensated=c) for c in (False, True))
    use_ema = decay < 1 and every == 1
    optimizer = keras.optimizers.SGD(LEARNING_RATE, use_ema=use_ema, ema_momentum=decay)
    optimizer.build(inner.trainable_variables)
    (w,) = inner.trainable_variables
    total = tf.Variable(np.zeros(value.shape))

    @tf.function(jit_compile=not options.graph)
    def walk(until):
        while optimizer.iterations < until:
            seed = [options.seed, tf.cast(optimizer.iterations, "int32")]
            noise = tf.random.stateless_normal(value.shape, seed)
            optimizer.apply([w - value + GRADIENT_NOISE * noise])
            plain.update_average()
            compensated.update_average()
            if optimizer.iterations % every == 0:
                total.assign(decay**every * total + tf.cast(w, "float64"))

    stop = round(STOPS_AFTER[regime] * options.steps)
    steps = np.unique([*np.geomspace(every, options.steps, 60).astype(int), stop])
    errors = {method: [] for method in COLOURS if use_ema or method != "Keras use_ema"}
    for step in steps:
        walk(tf.constant(step))
        if step == 1:
            first = inner.get_weights()[0].astype("float64")
        if step == stop:
            optimizer.learning_rate = 0.0
        moves = step // every
        shares = moves if decay == 1 else (1 - decay ** (moves * every)) / (1 - decay**every)
        exact = total.numpy() / shares
        for method, model in (("float32", plain), ("compensated", compensated)):
            errors[method].append(relative_error(model.average_model.get_weights()[0], exact))
        if use_ema:
            (average,) = optimizer._model_variables_moving_average
            exact_of_keras = (1 - decay) * total.numpy() + decay**step * first
            errors["Keras use_ema"].append(relative_error(average.numpy(), exact_of_keras))
    theory = expect(rule, options.steps, exact, generator)
    return {"steps": steps, "errors": {m: np.array(e) for m, e in errors.items()}, **theory}


def relative_error(average, exact):
    """Returns max|average - exact| / max|exact| for each run."""
    return np.abs(average - exact).max(axis=0) / np.abs(exact).max(axis=0)


def expect(rule, steps, exact, generator):
    """Predicts the rounding error of a float32 average.

    Args:
        rule: A `Rule`.
        steps: Int.
        exact: The average in float64, a column per run.
        generator: A NumPy generator.

    Returns:
        A dict: `random`, the median error if rounding errors are independent, and
        `bound`, the error if all are as large as possible and of the same sign.
        Both are relative, arrays with an entry per run.
    """
    every = rule.update_every
    kept = 1 - rule.weight(np.arange(2 * every, steps + 1, every), every)
    # Every later step keeps `1 - weight` of the rounding error of a step.
    kept = np.append(np.cumprod(kept[::-1])[::-1][1:], 1.0)
    unit = np.spacing(np.abs(exact).astype("float32")).astype("float64")
    deviation = unit * np.sqrt((kept**2).sum() / 12)
    walks = np.abs(generator.normal(size=(200, *exact.shape)) * deviation).max(axis=1)
    largest = np.abs(exact).max(axis=0)
    return {
        "random": np.median(walks, axis=0) / largest,
        "bound": unit.max(axis=0) / 2 * kept.sum() / largest,
    }


def format_results(results):
    """Formats a table with a row per regime, decay and method."""
    header = ["raw weights", "average", "method", "final error", "largest"]
    rows = []
    for (regime, decay), result in results.items():
        for method, errors in result["errors"].items():
            end = f"{errors[-1].mean():.1e} ± {errors[-1].std(ddof=1):.0e}"
            measured = [end, f"{errors.max():.1e}"]
            # The theory is for one float32 number updated by `weight * (w - average)`.
            theory = [f"{result[name].mean():.1e}" for name in ("random", "bound")]
            expected = theory if method == "float32" else ["", ""]
            rows.append([regime, name_of(decay), method, *measured, *expected])
    return format_table([*header, "random roundings", "bound"], rows, left=3)


def draw(path, results):
    """Plots the relative error against the step, a panel per regime and average."""
    from matplotlib.figure import Figure

    decays = list(dict.fromkeys(decay for _, decay in results))
    figure = Figure(figsize=(3 * len(decays) + 1, 6), layout="constrained")
    panels = figure.subplots(2, len(decays), sharex=True, sharey=True, squeeze=False)
    for row, regime in zip(panels, STOPS_AFTER, strict=True):
        for panel, decay in zip(row, decays, strict=True):
            result = results[regime, decay]
            for method, errors in result["errors"].items():
                # The first average is exact; log(0) cannot be plotted.
                mean = np.where(errors.mean(axis=1) > 0, errors.mean(axis=1), np.nan)
                panel.loglog(result["steps"], mean, color=COLOURS[method], label=method)
            for target in (1e-7, 2e-5):
                panel.axhline(target, color="#999999", linewidth=0.8, linestyle=":")
            panel.set_title(name_of(decay), loc="left", fontweight="bold")
            panel.grid(axis="y", color="#dddddd")
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"relative error\nraw weights {regime}")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
