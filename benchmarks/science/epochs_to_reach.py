"""How many epochs does an average need to reach the final loss of the raw model?

    python benchmarks/science/epochs_to_reach.py

Claim to test: at a constant rate an average reaches, after a part of the training, the
held-out loss at which the raw model ends.

A small dense net is trained on MNIST images, with true labels and with 40 % of them
random. One training per seed keeps the averages of several relative widths and reports
all of them, and the raw model, after each epoch. The loss of the raw model at the end is
its mean over the last three epochs, since a single one is noisy. The best width has the
lowest loss at any epoch, by the mean over the seeds.

Source: Kaddour 2022, Stop wasting my time! Saving days of ImageNet and BERT training with
latest weight averaging (epochs saved).
"""

import itertools

import mnist
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from settings import dense

from polyak_model import PolyakModel, PowerAverage
from polyak_model.cli.tables import print_table

WIDTHS = (0.05, 0.10, 0.15, 0.20, 0.25)
DEFAULT = WIDTHS.index(0.15)
SHARES = {"true labels": 0.0, "40 % random labels": 0.4}
LAST = 3


def main(arguments=None):
    parser = mnist.parser(__doc__.splitlines()[0], seeds=5, plot="epochs_to_reach.png")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    runs = mnist.with_progress(itertools.product(SHARES.values(), seeds))
    losses = [train(share, seed, options.epochs, options.images) for share, seed in runs]
    losses = np.reshape(losses, (len(SHARES), len(seeds), 1 + len(WIDTHS), options.epochs))
    print(f"{len(seeds)} seeds, {options.epochs} epochs, constant rate\n")
    header = ["labels", "average", "loss at the end", "less than raw", "epochs to reach raw"]
    print_table(header, rows(losses), left=2)
    draw(options.plot, losses)
    content = {"widths": WIDTHS, "labels": [*SHARES], "seeds": list(seeds)}
    mnist.write_json(options.json, {**content, "losses": losses.tolist()})


def train(share, seed, epochs, images=None):
    """Trains once and returns the held-out losses after each epoch.

    Args:
        share: Float, fraction of the training labels that is random.
        seed: Int.
        epochs: Int.
        images: Int, number of MNIST images, or None for all.

    Returns:
        An array of shape (1 + widths, epochs), the raw model first.
    """
    training = dense(seed, images, epochs, share=share)
    names = [f"width_{n}" for n in range(len(WIDTHS))]
    rules = map(PowerAverage.from_relative_width, WIDTHS)
    model = PolyakModel(
        training.model,
        dict(zip(names, rules, strict=True)),
        inference="raw",
        report=("raw", *names),
    )
    fit = {**training.arguments, "validation_data": training.held_out, "verbose": 0}
    history = model.fit(**fit).history
    return [history["val_loss"], *(history[f"val_{name}_loss"] for name in names)]


def epochs_to_reach(losses):
    """Returns the first epoch at which each loss is at most the raw model's at the end.

    Args:
        losses: Array of shape (1 + averages, epochs), the raw model first.

    Returns:
        An array of epochs, counted from 1; inf where it is never reached.

    Example:

    >>> epochs_to_reach(np.array([[4.0, 2, 2, 2], [3, 2, 1, 1], [4, 3, 3, 3]]))
    array([ 2., inf])
    """
    reached = losses[1:] <= losses[0, -LAST:].mean()
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, np.inf)


def find_best(losses):
    """Returns the index of the width of the lowest mean loss at any epoch.

    Args:
        losses: Array of shape (seeds, 1 + widths, epochs).
    """
    return int(losses[:, 1:].mean(axis=0).min(axis=1).argmin())


def rows(losses):
    """Yields the table rows: the raw model, the default and the best width.

    Args:
        losses: Array of shape (labels, seeds, 1 + widths, epochs).
    """
    for labels, own in zip(SHARES, losses, strict=True):
        end = own[:, 0, -LAST:].mean(axis=1)
        mean, error = mnist.mean_and_error(end)
        yield [labels, "raw", f"{mean:.4f} ± {error:.4f}", "", str(own.shape[-1])]
        epochs = np.array([epochs_to_reach(each) for each in own])
        for name, n in (("default", DEFAULT), ("best", find_best(own))):
            (mean, error), (less, its_error) = map(
                mnist.mean_and_error, (own[:, 1 + n, -1], end - own[:, 1 + n, -1])
            )
            reached = "never in some seed"
            if np.isfinite(epochs[:, n]).all():
                reached = "{:.1f} ± {:.1f}".format(*mnist.mean_and_error(epochs[:, n]))
            title = f"{name}, width {WIDTHS[n]}"
            difference = f"{less:.4f} ± {its_error:.4f}"
            yield [labels, title, f"{mean:.4f} ± {error:.4f}", difference, reached]


def draw(path, losses):
    """Plots the loss of the raw model and of averages against the epoch.

    Args:
        path: Path of a .png file.
        losses: As in `rows`.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(SHARES), squeeze=False)[0]
    for labels, own, panel in zip(SHARES, losses, panels, strict=True):
        means, errors = mnist.mean_and_error(own)
        epochs = np.arange(1, own.shape[-1] + 1)
        best = find_best(own)
        shown = {0: ("raw", "#d55e00"), 1 + best: (f"best, width {WIDTHS[best]}", "#009e73")}
        shown[1 + DEFAULT] = (f"default, width {WIDTHS[DEFAULT]}", "#0072b2")
        for n, (label, colour) in shown.items():
            panel.errorbar(epochs, means[n], errors[n], color=colour, label=label, marker=".")
        panel.axhline(means[0, -LAST:].mean(), color="#d55e00", linestyle=":")
        panel.set_title(labels, loc="left", fontsize=10)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out NLL")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
