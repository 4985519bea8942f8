"""Is a length that is picked after one training as good as one found by many trainings?

    python benchmarks/science/picked_afterwards.py

Claim to test: averages that are rebuilt from the snapshots of one training, and picked by
their loss on held-out images, are as good as those of a training for each length.

A small dense net is trained on MNIST images at a constant rate, for two and for twelve
epochs, with true labels and with 40 % of them random. Half of the held-out images picks
the length, the other half scores what was picked:

- one training: `PowerAverage.pair()` with snapshots, averages of all lengths rebuilt;
- kept: the same iterates, each average kept directly;
- grid: a training of its own for each length, each with another seed.

Differences from "one training" are within a seed, except those of the grid; standard
errors are over the seeds.

Source: Karras et al. 2024, Analyzing and improving the training dynamics of diffusion
models, section 3.
"""

import functools
import itertools
import pathlib
import tempfile

import mnist
import numpy as np
from matplotlib.figure import Figure
from settings import dense

from polyak_model import AverageSnapshots, PolyakModel, PowerAverage, clone_model, snapshots
from polyak_model.cli.tables import print_table

WIDTHS = (0.03, 0.075, 0.15, 0.20, 0.25)
RULES = [PowerAverage.from_relative_width(width) for width in WIDTHS]
DEFAULT = WIDTHS.index(0.15)
SETTINGS = {
    f"{name}, {labels} labels": functools.partial(dense, epochs=epochs, share=share)
    for (name, epochs), (labels, share) in itertools.product(
        [("short", 2), ("long", 12)], [("true", 0.0), ("noisy", 0.4)]
    )
}
WAYS = ("raw", "default", "one training", "kept", "grid")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def main(arguments=None):
    parser = mnist.parser(__doc__.splitlines()[0], seeds=3, plot="picked_afterwards.png")
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    runs = mnist.with_progress(itertools.product(SETTINGS, seeds))
    losses, curves = zip(*(measure(*run, options.images) for run in runs), strict=True)
    losses = np.reshape(losses, (len(SETTINGS), len(seeds), len(WAYS)))
    curves = np.reshape(curves, (len(SETTINGS), len(seeds), 2, len(WIDTHS)))
    print(f"Loss on images that picked nothing, mean over {len(seeds)} seeds; more than by")
    print(f"one training, which takes 1 run instead of the {len(WIDTHS)} of the grid\n")
    print_table(["setting", *WAYS], rows(losses))
    gap = np.abs(curves[:, :, 0] - curves[:, :, 1]).max()
    print(f"\nrebuilt and kept averages differ by at most {gap:.1e} in loss")
    draw(options.plot, curves)
    content = {"settings": [*SETTINGS], "ways": WAYS, "seeds": list(seeds)}
    mnist.write_json(options.json, {**content, "losses": losses.tolist()})


def measure(setting, seed, images=None):
    """Trains once with snapshots, once with all averages, and once for each length.

    Args:
        setting: A name in `SETTINGS`.
        seed: Int.
        images: Int, number of MNIST images, or None for all.

    Returns:
        Tuple of the losses of `WAYS` on the half that picks nothing, and the losses of
        rebuilt and of kept averages on all held-out images, by width.
    """
    training = SETTINGS[setting](seed, images)
    names = [f"width_{n}" for n in range(len(WIDTHS))]
    with tempfile.TemporaryDirectory() as folder:
        model = train(training, PowerAverage.pair(), [AverageSnapshots(folder)])
        raw = score(model.raw_model, training.held_out)
        # Uncompiled, since the file contains no optimizer.
        loaded, path = clone_model(model.raw_model), pathlib.Path(folder, "rebuilt.weights.h5")
        rebuilt = []
        for rule in RULES:
            snapshots.rebuild(folder, rule, path, max_error=1)
            loaded.load_weights(path)
            path.unlink()
            rebuilt.append(score(loaded, training.held_out))
    kept = train(SETTINGS[setting](seed, images), dict(zip(names, RULES, strict=True)))
    kept = [score(average, training.held_out) for average in kept.average_models.values()]
    grid = []
    for n, rule in enumerate(RULES, start=1):
        # Other weights and another order of the same images.
        other = SETTINGS[setting](seed, images, init=1_000 * n + seed)
        grid.append(score(train(other, rule).average_model, training.held_out))
    rebuilt, kept, grid = map(np.array, (rebuilt, kept, grid))
    losses = [raw[1], rebuilt[DEFAULT, 1], *(pick(each) for each in (rebuilt, kept, grid))]
    return losses, [rebuilt.mean(axis=1), kept.mean(axis=1)]


def train(training, average, callbacks=()):
    """Returns a trained `PolyakModel`."""
    model = PolyakModel(training.model, average)
    model.fit(**training.arguments, callbacks=list(callbacks), verbose=0)
    return model


def score(model, held_out):
    """Returns the mean negative log-likelihoods of both halves of the held-out images."""
    x, y = held_out
    probabilities = np.float64(model.predict(x, verbose=0))[np.arange(len(y)), y]
    losses = -np.log(np.maximum(probabilities, 1e-12))
    return [losses[::2].mean(), losses[1::2].mean()]


def pick(losses):
    """Returns the loss on the second half of what is best on the first.

    Args:
        losses: Array of shape (models, 2).

    Example:

    >>> float(pick(np.array([[0.3, 0.1], [0.2, 0.4]])))
    0.4
    """
    return losses[losses[:, 0].argmin(), 1]


def rows(losses):
    """Yields the table rows: means with errors, and after them the rest less one training's.

    Args:
        losses: Array of shape (settings, seeds, ways).
    """
    reference = losses[..., [WAYS.index("one training")]]
    for name, own, away in zip(SETTINGS, losses, losses - reference, strict=True):
        (means, errors), (more, its_errors) = map(mnist.mean_and_error, (own, away))
        yield [
            name,
            *(
                f"{means[n]:.4f} ± {errors[n]:.4f}"
                + (f"  {more[n]:+.4f} ± {its_errors[n]:.4f}" if way != "one training" else "")
                for n, way in enumerate(WAYS)
            ),
        ]


def draw(path, curves):
    """Plots the loss against the width, rebuilt and kept.

    Args:
        path: Path of a .png file.
        curves: Array of shape (settings, seeds, 2, widths).
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    means, errors = mnist.mean_and_error(np.moveaxis(curves, 1, 0))
    for name, (rebuilt, kept), (error, _), colour in zip(
        SETTINGS, means, errors, COLOURS[: len(SETTINGS)], strict=True
    ):
        panel.errorbar(WIDTHS, rebuilt, error, color=colour, marker="o", label=name)
        panel.plot(WIDTHS, kept, "x", color="#000000", markersize=9)
    panel.plot([], [], "x", color="#000000", label="kept directly")
    panel.set_xlabel("relative width of the average")
    panel.set_ylabel("held-out NLL of averages rebuilt from one training")
    panel.grid(axis="y", color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
