"""Constant learning rate with an average, compared with a cosine without one.

    python benchmarks/science/constant_or_cosine.py

Claim to test: the average of a run at a constant rate replaces decaying the rate, and
one run serves every budget of epochs, while each cosine needs its budget in advance.
Which is better depends on the peak rate and on the budget.

A dense net (784-256-128-10, SGD with momentum) is trained on 3,200 MNIST images. 800
others select the best peak rate for each method, budget and metric, by the mean over
the seeds, and 1,000 others give the scores shown. The memories of the averages are not
tuned: a half-life of one epoch, and the default power-function average. All runs of a
seed share the split, the initial weights and the order. Differences are within a seed,
and their standard errors are over the seeds.

With `--random-labels 0.4` a fraction of the training labels is random; held-out labels
are true, and the 800 are as noisy as the 3,200. Compare accuracy only: under label noise
all methods are under-confident, and the likelihood on true labels mostly measures that.

Source: Sandler et al. 2023, Training trajectories, mini-batch losses and the
curious role of the learning rate; Hägele et al. 2024, Scaling laws and
compute-optimal training beyond fixed training durations.
"""

import itertools

import mnist
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from polyak_model import ExponentialAverage, PolyakModel, PowerAverage
from polyak_model.cli.demo.experiment import COLOURS
from polyak_model.cli.tables import format_table

METHODS = {
    "constant, raw": COLOURS["raw"],
    "constant, exponential average": COLOURS["average"],
    "constant, power average": "#56b4e9",
    "cosine, raw": "#000000",
}
RATES = (0.0125, 0.025, 0.05, 0.1)
BUDGETS = (5, 10)
DIFFERENCE = "- cosine"


def main(arguments=None):
    parser = mnist.parser(__doc__.splitlines()[0], seeds=5, plot="constant_or_cosine.png")
    parser.add_argument("--random-labels", type=float, default=0.0, help="fraction, 0 to 1")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak rates")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="increasing epochs")
    options = parser.parse_args(arguments)
    if any(end <= begin for begin, end in itertools.pairwise([0, *options.budgets])):
        parser.error(f"--budgets must rise from at least 1 epoch. Received: {options.budgets}")
    seeds = range(options.seed, options.seed + options.seeds)
    scores = np.array(
        [
            measure(rate, seed, options.budgets, options.random_labels, options.images)
            for rate, seed in mnist.with_progress(itertools.product(options.rates, seeds))
        ]
    )
    scores = scores.reshape(len(options.rates), len(seeds), *scores.shape[1:])
    validation, held_out = np.moveaxis(scores, -2, 0)
    print(f"{options.seeds} seeds, {options.random_labels:.0%} random labels\n")
    print("At equal rates\n")
    print(equal_rates_table(held_out, options.rates, options.budgets))
    print("\nEach at its best rate, selected on validation images\n")
    print(best_rates_table(validation, held_out, options.rates, options.budgets))
    draw(options.plot, held_out, options.rates, options.budgets)
    content = {"rates": list(options.rates), "budgets": list(options.budgets)}
    mnist.write_json(options.json, {**content, "seeds": list(seeds), "scores": scores.tolist()})


def measure(rate, seed, budgets, share=0.0, images=None):
    """Trains one seed at one peak rate with all methods.

    Args:
        rate: Float.
        seed: Int.
        budgets: Increasing numbers of epochs.
        share: Float, fraction of the training labels that is random.
        images: Int, number of images, or None for all.

    Returns:
        An array of shape (methods, budgets, parts, metrics). The parts are
        validation and held-out.
    """
    (x, y), held_out = mnist.load(seed, share, images)
    cut = len(x) // 5
    training, validation = (x[cut:], y[cut:]), (x[:cut], y[:cut])
    data = training, (validation, held_out)
    epoch = mnist.steps_per_epoch(len(x) - cut)

    def build(schedule, epochs):
        return mnist.build_model(schedule, rate, epochs * epoch, seed)

    # A PolyakModel has one average; with the same seed, each gets the same iterates.
    rules = ExponentialAverage.from_half_life(epoch), PowerAverage()
    averages = []
    for rule in rules:
        model = PolyakModel(build("constant", budgets[-1]), rule, report=("average", "raw"))
        logs = train(model, data, budgets)
        averages.append(_metrics(logs))
    cosine = [
        _metrics(train(build("cosine", budget), data, budgets[: n + 1]))[-1]
        for n, budget in enumerate(budgets)
    ]
    return np.array([_metrics(logs, "raw_"), *averages, cosine])


def train(model, data, budgets):
    """Trains a model and scores it after each budget of epochs.

    Args:
        model: A compiled model.
        data: Tuple of the training `(x, y)` and of the parts to score on.
        budgets: Increasing numbers of epochs.

    Returns:
        For each budget, a list of the logs on each part.
    """
    training, parts = data
    logs = []
    for begin, end in itertools.pairwise([0, *budgets]):
        model.fit(
            *training, batch_size=mnist.BATCH_SIZE, initial_epoch=begin, epochs=end, verbose=0
        )
        logs.append([model.evaluate(*part, return_dict=True, verbose=0) for part in parts])
    return logs


def _metrics(logs, prefix=""):
    return np.array([[mnist.metrics(part, prefix) for part in parts] for parts in logs])


def equal_rates_table(held_out, rates, budgets):
    """Formats each method at each rate, and its difference from the cosine at that rate.

    Args:
        held_out: Array of shape (rates, seeds, methods, budgets, metrics).
        rates: Peak learning rates.
        budgets: Epochs.
    """
    rows = []
    for (b, budget), (r, rate) in itertools.product(enumerate(budgets), enumerate(rates)):
        for method, cells in _compared(held_out[r, :, :, b]):
            rows.append([str(budget), f"{rate:g}", method, *cells])
    accuracy, likelihood = mnist.METRICS.values()
    header = ["epochs", "rate", "method", accuracy, DIFFERENCE, likelihood, DIFFERENCE]
    return format_table(header, rows, left=3)


def best_rates_table(validation, held_out, rates, budgets):
    """Formats each method at its own best rate, and its difference from the cosine at its best.

    Args:
        validation: Array of shape (rates, seeds, methods, budgets, metrics), which
            selects the rates.
        held_out: Array of the same shape, which is shown.
        rates: Peak learning rates.
        budgets: Epochs.
    """
    # The highest accuracy is best, and the lowest negative log-likelihood.
    best = (validation.mean(axis=1) * [1, -1]).argmax(axis=0)
    chosen = np.take_along_axis(held_out, best[np.newaxis, np.newaxis], axis=0)[0]
    rows = []
    for b, budget in enumerate(budgets):
        for indices, (method, cells) in zip(best[:, b], _compared(chosen[:, :, b]), strict=True):
            by_accuracy, by_likelihood = (f"{rates[index]:g}" for index in indices)
            rows.append([str(budget), method, by_accuracy, *cells[:2], by_likelihood, *cells[2:]])
    accuracy, likelihood = mnist.METRICS.values()
    header = ["epochs", "method", "rate", accuracy, DIFFERENCE, "rate", likelihood, DIFFERENCE]
    return format_table(header, rows, left=2)


def _compared(scores):
    # `scores` has shape (seeds, methods, metrics).
    for m, method in enumerate(METHODS):
        estimates = mnist.estimates(scores[:, m])
        differences = mnist.estimates(scores[:, m] - scores[:, -1], sign="+")
        if method == list(METHODS)[-1]:
            differences = ["", ""]
        yield method, [cell for pair in zip(estimates, differences, strict=True) for cell in pair]


def draw(path, held_out, rates, budgets):
    """Plots the metrics of each method against the peak rate: means and standard errors.

    Args:
        path: Path of a .png file.
        held_out: Array of shape (rates, seeds, methods, budgets, metrics).
        rates: Peak learning rates.
        budgets: Epochs.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(
        len(mnist.METRICS), len(budgets), sharex=True, sharey="row", squeeze=False
    )
    means, errors = mnist.mean_and_error(np.moveaxis(held_out, 1, 0))
    for (row, column), panel in np.ndenumerate(panels):
        for method, (name, colour) in enumerate(METHODS.items()):
            mean, error = (values[:, method, column, row] for values in (means, errors))
            panel.errorbar(rates, mean, error, color=colour, label=name, marker="o", capsize=3)
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="y", color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    for panel, budget in zip(panels[0], budgets, strict=True):
        panel.set_title(f"{budget} epochs", loc="left", fontweight="bold")
    for panel in panels[-1]:
        panel.set_xlabel("peak learning rate")
    for panel, metric in zip(panels[:, 0], mnist.METRICS.values(), strict=True):
        panel.set_ylabel(f"held-out {metric}")
    panels[-1, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
