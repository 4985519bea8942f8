"""BatchNormalization statistics for a uniform average of the weights: copied, averaged, refreshed.

Claim: at a large, constant learning rate, the statistics of a uniform average should
be refreshed. Averaged statistics (`non_trainable="average"`) match the activations of
no single net; copied ones (`"copy"`) match those of the last iterate.

    python benchmarks/science/batch_normalization.py

A net (784-256-128-10, BatchNormalization, SGD without momentum) is trained on 4,000
digits. Its uniform average over all steps is scored on 1,000 others with each kind of
statistics, over paired seeds. The smaller the batch, the noisier the iterates and the
further they are from their average.

Source: Izmailov et al. 2018, Averaging weights leads to wider optima, section 3.2.
"""

import keras
import mnist
import numpy as np
from keras import layers
from matplotlib.figure import Figure

from polyak_model import PolyakModel, UniformAverage
from polyak_model.cli.tables import format_table

STATISTICS = ("copied", "averaged", "refreshed", "raw model")
COLOURS = ("#cc79a7", "#0072b2", "#009e73", "#d55e00")


def main():
    options = parse()
    scores = {size: [] for size in options.batch_sizes}
    runs = [(size, seed) for size in options.batch_sizes for seed in range(options.seeds)]
    for size, seed in mnist.with_progress(runs):
        scores[size].append(score(options.seed + seed, size, options))
    header = ["batch size", "statistics", *mnist.METRICS.values(), "minus averaged, %"]
    print(format_table(header, rows(scores), left=2))
    draw(scores, options.plot)
    mnist.write_json(options.json, {size: np.array(s).tolist() for size, s in scores.items()})


def parse():
    parser = mnist.parser(__doc__.splitlines()[0], seeds=5, plot="batch_normalization.png")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.5)
    return parser.parse_args()


def build_model(rate, seed):
    """Builds and compiles a dense net with BatchNormalization, after seeding Keras."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten()])
    for units in (256, 128):
        model.add(layers.Dense(units, activation="relu"))
        model.add(layers.BatchNormalization())
    model.add(layers.Dense(mnist.CLASSES, activation="softmax"))
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.SGD(rate), loss, metrics=["accuracy"], jit_compile=False)
    return model


def score(seed, batch_size, options):
    """Trains a net; scores the average with each kind of statistics, and the raw model.

    Returns:
        A list of shape (statistics, metrics).
    """
    training, held_out = mnist.load(seed, size=options.images)
    model = PolyakModel(build_model(options.learning_rate, seed), UniformAverage())
    model.fit(*training, batch_size=batch_size, epochs=options.epochs, verbose=0)

    def evaluate(using="average"):
        return model.evaluate(*held_out, verbose=0, return_dict=True, using=using)

    averaged, raw = evaluate(), evaluate("raw")
    model.refresh_statistics(training[0], batch_size=batch_size, verbose=0)
    refreshed = evaluate()
    copy_statistics(model.raw_model, model.average_model)
    return [mnist.metrics(logs) for logs in (evaluate(), averaged, refreshed, raw)]


def copy_statistics(raw, average):
    """Copies the statistics of the raw model, as `non_trainable="copy"` does at each step."""
    for layer, copy in zip(raw.layers, average.layers, strict=True):
        if isinstance(layer, layers.BatchNormalization):
            copy.moving_mean.assign(layer.moving_mean)
            copy.moving_variance.assign(layer.moving_variance)


def rows(scores):
    """Yields the table rows, with paired differences in accuracy and their errors."""
    for size, of_seeds in scores.items():
        of_seeds = np.array(of_seeds)
        for name, own in zip(STATISTICS, of_seeds.swapaxes(0, 1), strict=True):
            away = own - of_seeds[:, STATISTICS.index("averaged")]
            accuracy = "" if name == "averaged" else mnist.estimates(away, sign="+")[0]
            yield [str(size), name, *mnist.estimates(own), accuracy]


def draw(scores, path):
    """Plots accuracy against batch size, with standard errors."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    mean, error = zip(
        *(mnist.mean_and_error(of_seeds) for of_seeds in scores.values()), strict=True
    )
    for i, (name, colour) in enumerate(zip(STATISTICS, COLOURS, strict=True)):
        heights, bars = ([values[i, 0] for values in each] for each in (mean, error))
        axes.errorbar(list(scores), heights, bars, color=colour, label=name, marker="o", capsize=3)
    axes.set_title("Held-out accuracy of the uniform average, %", loc="left", fontweight="bold")
    axes.set_xlabel("batch size")
    axes.set_xscale("log")
    axes.set_xticks(list(scores), labels=map(str, scores))
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
