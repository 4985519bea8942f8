"""The error of averages that are rebuilt from snapshots: measured, and as it is told.

    python benchmarks/science/rebuilt_errors.py

Claim: the walk error, which `polyak_model.snapshots.rebuild` computes from the steps of
the snapshots alone, tells the order of the error of the weights.

Of each of two nets, one training keeps `PowerAverage.pair()` and snapshots of it at even
distances, and one of equal iterates keeps the averages that are to be rebuilt. The
error is the L2 norm of the difference of the two, divided by that of the distance of the
average from the raw weights. It is told for iterates that walk at random, while those
of a training are also noisy and drift.

Source: Karras et al. 2024, Analyzing and improving the training dynamics of diffusion
models, appendix C.
"""

import functools
import itertools
import pathlib
import tempfile
import warnings

import mnist
import numpy as np
from matplotlib.figure import Figure
from settings import dense, regression

from polyak_model import (
    AverageSnapshots,
    ExponentialAverage,
    PolyakModel,
    PowerAverage,
    UniformAverage,
    clone_model,
    snapshots,
)
from polyak_model.cli.tables import print_table

NETS = {
    "classification, noisy labels": functools.partial(dense, epochs=4, share=0.4),
    "regression": functools.partial(regression, epochs=20),
}
COUNTS = (8, 16, 32)
COLOURS = ("#d55e00", "#0072b2", "#009e73")


def targets(steps):
    """Returns the rules to rebuild by name, for a run of this many optimizer steps."""
    width = PowerAverage.from_relative_width
    return {
        **{f"power {w:.3g}": width(w) for w in (0.02, 0.05, 0.10, 0.15, 0.25)},
        "uniform": UniformAverage(),
        "last quarter": UniformAverage(start_step=steps - steps // 4),
        "half-life 1/20": ExponentialAverage.from_half_life(steps / 20),
    }


def main(arguments=None):
    parser = mnist.parser(__doc__.splitlines()[0], seeds=3, plot="rebuilt_errors.png")
    options = parser.parse_args(arguments)
    # The uniform average does remember it.
    warnings.filterwarnings("ignore", "The average .* remembers the initial phase")
    seeds = range(options.seed, options.seed + options.seeds)
    runs = mnist.with_progress(itertools.product(NETS, seeds))
    errors = np.array([measure(net, seed, options.images) for net, seed in runs])
    errors = errors.reshape(len(NETS), len(seeds), *errors.shape[1:])
    print(
        f"Error in % of the distance from the raw weights: measured over {len(seeds)} seeds, told\n"
    )
    header = ["net", "average", *(f"{count} snapshots" for count in COUNTS)]
    print_table(header, rows(errors), left=2)
    told, measured = errors[..., 0], errors[..., 1]
    factors = measured / told
    print(f"\nmeasured / told: median {np.median(factors):.2f}, {factors.min():.2f} to ", end="")
    print(f"{factors.max():.2f}; at most 3 in {np.mean(factors <= 3):.0%}")
    draw(options.plot, errors)
    content = {"nets": [*NETS], "counts": COUNTS, "averages": [*targets(8)], "seeds": list(seeds)}
    mnist.write_json(options.json, {**content, "errors": errors.tolist()})


def measure(net, seed, images=None):
    """Trains twice with equal iterates and compares rebuilt averages with kept ones.

    Args:
        net: A name in `NETS`.
        seed: Int.
        images: Int, number of MNIST images, or None for all.

    Returns:
        An array of shape (counts, averages, 2): the errors told and measured.
    """
    training = NETS[net](seed, images)
    rules = {f"rule_{n}": rule for n, rule in enumerate(targets(training.steps).values())}
    kept = train(training, rules)
    raw = flat(kept.raw_model)
    errors = np.empty((len(COUNTS), len(rules), 2))
    with tempfile.TemporaryDirectory() as folder:
        folders = [pathlib.Path(folder, str(count)) for count in COUNTS]
        callbacks = [
            AverageSnapshots(path, every=training.steps // count)
            for path, count in zip(folders, COUNTS, strict=True)
        ]
        model = train(NETS[net](seed, images), PowerAverage.pair(), *callbacks)
        # Uncompiled, since the file contains no optimizer.
        loaded, path = clone_model(model.raw_model), pathlib.Path(folder, "rebuilt.weights.h5")
        for c, n in np.ndindex(errors.shape[:2]):
            name = f"rule_{n}"
            told = snapshots.rebuild(folders[c], rules[name], path, max_error=1)
            loaded.load_weights(path)
            path.unlink()
            rebuilt, true = flat(loaded), flat(kept.average_models[name])
            measured = np.linalg.norm(rebuilt - true) / np.linalg.norm(true - raw)
            errors[c, n] = told.walk_error, measured
    return errors


def train(training, average, *callbacks):
    """Returns a trained `PolyakModel`."""
    model = PolyakModel(training.model, average)
    model.fit(**training.arguments, callbacks=list(callbacks), verbose=0)
    return model


def flat(model):
    """Returns all weights of a model as one float64 vector."""
    return np.concatenate([np.ravel(weight) for weight in model.get_weights()], dtype="float64")


def rows(errors):
    """Yields the table rows: for each count the measured error, and the one told.

    Args:
        errors: Array of shape (nets, seeds, counts, averages, 2), told and measured.
    """
    means, its_errors = mnist.mean_and_error(100 * np.moveaxis(errors, 1, 0))
    for (n, net), (a, average) in itertools.product(enumerate(NETS), enumerate(targets(8))):
        cells = [
            f"{means[n, c, a, 1]:.3f} ± {its_errors[n, c, a, 1]:.3f}, {means[n, c, a, 0]:.3f}"
            for c in range(len(COUNTS))
        ]
        yield [net, average, *cells]


def draw(path, errors):
    """Plots measured errors against those told, with lines at equal and three times.

    Args:
        path: Path of a .png file.
        errors: As in `rows`.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    told, measured = np.moveaxis(errors, -1, 0)
    ends = np.array([told.min(), told.max()])
    panels = figure.subplots(1, len(NETS), sharex=True, sharey=True, squeeze=False)[0]
    for n, panel in enumerate(panels):
        for c, count in enumerate(COUNTS):
            colour, label = COLOURS[c], f"{count} snapshots"
            panel.loglog(
                told[n, :, c].ravel(), measured[n, :, c].ravel(), ".", c=colour, label=label
            )
        panel.plot(ends, ends, color="#999999")
        panel.plot(ends, 3 * ends, color="#999999", linestyle=":", label="three times the told one")
        panel.set_title([*NETS][n], loc="left", fontsize=10)
        panel.set_xlabel("error told")
        panel.spines[["top", "right"]].set_visible(False)
        if n == 0:
            panel.set_ylabel("error measured")
            panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
