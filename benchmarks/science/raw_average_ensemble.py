"""Gain of the average and of the ensemble over the raw model, and where there is none.

    python benchmarks/science/raw_average_ensemble.py

Claim: at a constant learning rate the average beats the last iterate, most of all with
random labels. Once the rate has decayed to 0, there is little noise left to average.

A dense net (784-256-128-10, SGD with momentum) is trained on 4,000 MNIST images, at a
constant rate or a cosine decay to 0, with true labels or 40 % random ones, and is scored
on 1,000 others with true labels. The half-life of the average is one epoch. The learning
rate was chosen in advance on a seed that is not used here. One run gives all three
routes, and all conditions share their seeds: the split, the initial weights and the
order. Differences are within a run. Standard errors are over the seeds, whose splits are
of the same 5,000 images. Under random labels compare accuracy only: the likelihood of
true labels then mostly measures under-confidence.

Source: Izmailov et al. 2018, Averaging weights leads to wider optima and better
generalization; random labels as in Zhang et al. 2017, Understanding deep learning
requires rethinking generalization.
"""

import itertools

import mnist
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polyak_model import ExponentialAverage, PolyakModel
from polyak_model.cli.demo.experiment import COLOURS, PREFIXES
from polyak_model.cli.tables import format_table

SCHEDULES = ("constant", "cosine")
SHARES = (0.0, 0.4)
RATE = 0.05
HEADER = ["rate", "random labels", "route", *mnist.METRICS.values()]


def main(arguments=None):
    parser = mnist.parser(__doc__.splitlines()[0], seeds=10, plot="raw_average_ensemble.png")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    scores = {condition: [] for condition in itertools.product(SCHEDULES, SHARES)}
    for condition, seed in mnist.with_progress(itertools.product(scores, seeds)):
        scores[condition].append(train(*condition, seed, options.epochs, options.images))
    print(f"{options.seeds} seeds, {options.epochs} epochs, learning rate {RATE}\n")
    print(format_table(HEADER, table_rows(scores), left=3))
    draw(options.plot, scores)
    runs = {_title(condition): np.stack(runs).tolist() for condition, runs in scores.items()}
    mnist.write_json(options.json, {"seeds": list(seeds), "runs": runs})


def _title(condition):
    schedule, share = condition
    return f"{schedule} rate, {share:.0%} random labels"


def train(schedule, share, seed, epochs, images=None):
    """Trains a net and scores all routes on held-out images after each epoch.

    Args:
        schedule: `"constant"` or `"cosine"`.
        share: Float, fraction of the training labels that is random.
        seed: Int.
        epochs: Int.
        images: Int, number of images, or None for all.

    Returns:
        An array of shape (routes, metrics, epochs). The routes are raw, average
        and ensemble; the metrics are accuracy in per cent and negative
        log-likelihood.
    """
    training, held_out = mnist.load(seed, share, images)
    epoch = mnist.steps_per_epoch(len(training[0]))
    model = PolyakModel(
        mnist.build_model(schedule, RATE, epochs * epoch, seed),
        average=ExponentialAverage.from_half_life(epoch),
        report=("average", "raw", "ensemble"),
    )
    history = model.fit(
        *training,
        batch_size=mnist.BATCH_SIZE,
        epochs=epochs,
        validation_data=held_out,
        verbose=0,
    ).history
    return np.array([mnist.metrics(history, prefix) for prefix in PREFIXES.values()])


def table_rows(scores):
    """Returns the table rows: routes after the last epoch, and differences from raw.

    Args:
        scores: Dict from `(schedule, share)` to the results of `train`, one per
            seed.
    """
    rows = []
    for (schedule, share), runs in scores.items():
        condition = [schedule, f"{share:.0%}"]
        last = np.stack(runs)[..., -1]
        routes = dict(zip(PREFIXES, np.moveaxis(last, 1, 0), strict=True))
        for route, values in routes.items():
            rows.append([*condition, route, *mnist.estimates(values)])
        for route in ("average", "ensemble"):
            difference = mnist.estimates(routes[route] - routes["raw"], sign="+")
            rows.append([*condition, f"{route} - raw", *difference])
    return rows


def draw(path, scores):
    """Plots the metrics of each route against the epoch: means ± one standard error.

    Args:
        path: Path of a .png file.
        scores: As in `table_rows`.
    """
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(
        len(mnist.METRICS), len(scores), sharex=True, sharey="row", squeeze=False
    )
    for column, (condition, runs) in zip(panels.T, scores.items(), strict=True):
        column[0].set_title(_title(condition), loc="left", fontsize=10)
        column[-1].set_xlabel("epoch")
        means, errors = mnist.mean_and_error(runs)
        epochs = np.arange(1, means.shape[-1] + 1)
        for route, mean, error in zip(PREFIXES, means, errors, strict=True):
            for panel, m, e in zip(column, mean, error, strict=True):
                panel.plot(epochs, m, color=COLOURS[route], label=route, marker="o", markersize=3)
                panel.fill_between(epochs, m - e, m + e, color=COLOURS[route], alpha=0.2, lw=0)
                panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
                panel.grid(axis="y", color="#dddddd")
                panel.spines[["top", "right"]].set_visible(False)
    for panel, metric in zip(panels[:, 0], mnist.METRICS.values(), strict=True):
        panel.set_ylabel(f"held-out {metric}")
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
