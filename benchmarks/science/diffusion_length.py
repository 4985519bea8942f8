"""The best length of the average of a diffusion model, found after training.

    python benchmarks/science/diffusion_length.py

Claim to test: the digits that a diffusion model draws are better if its net is an
average, and which length is best depends on the length of the run.

A small net is trained to denoise 8x8 digits at a constant rate, in runs of three
lengths. Each run keeps two averages and 16 to 33 snapshots of them, and the averages of
all other lengths are rebuilt from these. An average is scored by its loss on held-out
digits, and by the sliced Wasserstein distance of 1,000 digits that it draws to those
held out. All averages start from the same noise, so differences are within a run; the
standard errors are over the seeds.

Source: Karras et al. 2024, Analyzing and improving the training dynamics of diffusion
models, section 3.
"""

import itertools
import pathlib
import tempfile

import diffusion
import mnist
import numpy as np
from matplotlib.figure import Figure

from polyak_model import AverageSnapshots, PolyakModel, PowerAverage, clone_model, snapshots
from polyak_model.cli.tables import print_table

WIDTHS = (0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
METRICS = ("distance of samples", "denoising loss")
COLOURS = ("#56b4e9", "#0072b2", "#000000", "#009e73")
SHOWN = 12


def main(arguments=None):
    parser = mnist.parser(__doc__.splitlines()[0], seeds=3, plot="diffusion_length.png")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1_200, 3_600])
    parser.add_argument("--samples", type=int, default=1_000)
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    runs = mnist.with_progress(itertools.product(options.steps, seeds))
    scores, drawn = zip(*(measure(*run, options.samples) for run in runs), strict=True)
    scores = np.reshape(scores, (len(options.steps), len(seeds), len(WIDTHS) + 1, len(METRICS)))
    floor = mnist.mean_and_error(
        [diffusion.sliced_distance(*diffusion.load(seed)) for seed in seeds]
    )
    for metric, name in enumerate(METRICS):
        print(f"{name}: mean and standard error over {len(seeds)} seeds\n")
        print_table(["width", *(f"{n:,} steps" for n in options.steps)], rows(scores[..., metric]))
        print()
    print(f"distance of training digits to held-out ones: {floor[0]:.4f} ± {floor[1]:.4f}")
    draw(options.plot, options.steps, scores, floor[0], drawn[:: len(seeds)])
    content = {"widths": ["raw", *WIDTHS], "steps": options.steps, "seeds": list(seeds)}
    mnist.write_json(options.json, {**content, "scores": scores.tolist()})


def measure(steps, seed, samples):
    """Trains once and scores the raw model and the rebuilt averages.

    Args:
        steps: Int, the length of the run.
        seed: Int.
        samples: Int, the number of digits to draw.

    Returns:
        Tuple of an array of shape (1 + widths, metrics), the raw model first, and of
        a few digits that each model has drawn.
    """
    training, held_out = diffusion.load(seed)
    model = PolyakModel(diffusion.build_model(2e-3, seed), PowerAverage.pair())
    x, y = diffusion.training_pairs(training, steps, seed)
    pairs = diffusion.held_out_pairs(held_out)
    scores, drawn = [], []

    def score(net):
        digits = diffusion.sample(net, samples, seed)
        loss = net.evaluate(*pairs, batch_size=1_000, verbose=0)
        scores.append([diffusion.sliced_distance(digits, held_out), loss])
        drawn.append(digits[:SHOWN])

    with tempfile.TemporaryDirectory() as folder:
        snapshot = AverageSnapshots(folder)
        arguments = {"batch_size": diffusion.BATCH_SIZE, "shuffle": False, "verbose": 0}
        model.fit(x, y, callbacks=[snapshot], **arguments)
        score(model.raw_model)
        # Uncompiled, since the file contains no optimizer.
        loaded, rebuilt = clone_model(model.raw_model), pathlib.Path(folder, "rebuilt.weights.h5")
        for width in WIDTHS:
            rule = PowerAverage.from_relative_width(width)
            snapshots.rebuild(folder, rule, rebuilt)
            loaded.load_weights(rebuilt)
            model.raw_model.set_weights(loaded.get_weights())
            score(model.raw_model)
            rebuilt.unlink()
    return scores, drawn


def rows(scores):
    """Yields the table rows: means with errors, and after them those less the best width's.

    Args:
        scores: Array of shape (steps, seeds, 1 + widths).
    """
    best = scores.mean(axis=1)[:, 1:].argmin(axis=1) + 1
    away = scores - np.take_along_axis(scores, best[:, None, None], axis=2)
    for n, name in enumerate(["raw", *WIDTHS]):
        cells = []
        for own, difference in zip(scores[:, :, n], away[:, :, n], strict=True):
            (mean, error), (more, its_error) = map(mnist.mean_and_error, (own, difference))
            further = f"{more:+.4f} ± {its_error:.4f}" if difference.any() else "best" + 12 * " "
            cells.append(f"{mean:.4f} ± {error:.4f}  {further}")
        yield [str(name), *cells]


def draw(path, steps, scores, floor, drawn):
    """Plots the scores against the width, and digits of the raw model and of averages.

    Args:
        path: Path of a .png file.
        steps: Lengths of the runs.
        scores: Array of shape (steps, seeds, 1 + widths, metrics).
        floor: Float, the distance of training digits to held-out ones.
        drawn: For each length, digits of the first seed by each model.
    """
    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    means, errors = mnist.mean_and_error(np.moveaxis(scores, 1, 0))
    for metric, panel in enumerate(above.subplots(1, len(METRICS))):
        for n, (length, colour) in enumerate(zip(steps, COLOURS, strict=False)):
            mean, error = means[n, :, metric], errors[n, :, metric]
            label = f"{length:,} steps"
            panel.errorbar(WIDTHS, mean[1:], error[1:], color=colour, marker="o", label=label)
            panel.axhline(mean[0], color=colour, linestyle=":")
        panel.set_title(f"{METRICS[metric]} (dotted: raw model)", loc="left", fontsize=10)
        panel.set_xlabel("relative width of the average")
        panel.set_yscale("log")
        panel.grid(axis="y", color="#dddddd", which="both")
        panel.spines[["top", "right"]].set_visible(False)
        if metric == 0:
            panel.axhline(floor, color="#999999", label="training digits")
            panel.legend(frameon=False)
    best = means[:, 1:, 0].argmin(axis=1) + 1
    panels = below.subplots(2 * len(steps), 1)
    for n, length in enumerate(steps):
        names = (0, "raw"), (best[n], f"width {WIDTHS[best[n] - 1]}")
        for panel, (model, name) in zip(panels[2 * n : 2 * n + 2], names, strict=True):
            digits = np.reshape(drawn[n][model], (-1, 8, 8))
            panel.imshow(np.hstack(digits), cmap="gray_r", vmin=-0.4, vmax=0.9)
            panel.set_ylabel(f"{length:,} steps\n{name}", rotation=0, ha="right", va="center")
            panel.set_xticks([])
            panel.set_yticks([])
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
