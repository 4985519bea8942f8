"""`polyak-model average`: average weight files after training."""

import pathlib
import typing

import typer
from typer.core import TyperCommand

from polyak_model.checkpoints import average_files
from polyak_model.cli.average_options import choose_files, choose_weights, join_numbers
from polyak_model.cli.checks import check_decay
from polyak_model.cli.hints import abridge, refresh_hint
from polyak_model.cli.progress import show_progress
from polyak_model.cli.refreshing import check_refreshable, refreshing
from polyak_model.errors import printable


class Command(TyperCommand):
    """Accepts several numbers after `--weights`."""

    def parse_args(self, context, arguments):
        return super().parse_args(context, join_numbers(arguments, "--weights"))


def average(
    files: typing.Annotated[
        list[pathlib.Path],
        typer.Argument(
            metavar="FILES",
            exists=True,
            help="Files saved by Keras: .keras, .weights.h5 or .weights.json; or .safetensors "
            "files of any framework; or one folder of them, with --last or --best.",
        ),
    ],
    output: typing.Annotated[
        pathlib.Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write: .weights.h5, .safetensors, or .keras from .keras files.",
        ),
    ],
    weights: typing.Annotated[
        str | None,
        typer.Option(metavar="W1 W2 ...", help="The weight of each file, relative to the others."),
    ] = None,
    rule: typing.Annotated[
        typing.Literal["uniform", "exponential", "polynomial", "power", "decay"],
        typer.Option(
            help="The rule that weights the files in their order. decay: raw checkpoints of a "
            "constant learning rate are averaged to the weights that a decay of it would give."
        ),
    ] = "uniform",
    decay: typing.Annotated[
        float | None,
        typer.Option(
            metavar="D", callback=check_decay, help="Decay of --rule exponential, in [0, 1)."
        ),
    ] = None,
    eta: typing.Annotated[
        float | None,
        typer.Option(metavar="ETA", min=0, help="Exponent of --rule polynomial. Default: 3."),
    ] = None,
    gamma: typing.Annotated[
        float | None,
        typer.Option(metavar="GAMMA", min=0, help="Exponent of --rule power. Default: 6.94."),
    ] = None,
    shape: typing.Annotated[
        typing.Literal["cosine", "linear", "1-sqrt"] | None,
        typer.Option(help="The learning-rate decay that --rule decay imitates. Default: linear."),
    ] = None,
    last: typing.Annotated[
        int | None,
        typer.Option(
            metavar="K", min=2, help="Only the last K files by name, where 9 comes before 10."
        ),
    ] = None,
    best: typing.Annotated[
        int | None,
        typer.Option(metavar="K", min=2, help="Only the best K epochs. Needs --by and --mode."),
    ] = None,
    by: typing.Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv:COLUMN",
            help="The column that --best compares, in a file of keras.callbacks.CSVLogger. That "
            "file counts epochs from 0, the names of weight files from 1.",
        ),
    ] = None,
    mode: typing.Annotated[
        typing.Literal["min", "max"] | None,
        typer.Option(help="Whether the smallest or the largest values of the column are best."),
    ] = None,
    refresh: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE.npz",
            exists=True,
            dir_okay=False,
            help="Training data, an array x, to refresh BatchNormalization statistics of .keras "
            "files.",
        ),
    ] = None,
    quiet: typing.Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Average weight files after training."""
    chosen = choose_files(files, output, last, best, by, mode)
    options = {"decay": decay, "eta": eta, "gamma": gamma}
    relative = choose_weights(len(chosen), weights, rule, options, shape)
    if refresh is not None:
        check_refreshable(output, chosen)
    with show_progress("Averaging", quiet) as update, refreshing(output, refresh) as path:
        result = average_files(chosen, path, relative, update)
    if not quiet:
        _report(chosen, output, result, is_refreshed=refresh is not None)


def _report(files, output, result, is_refreshed):
    print(f"Averaged {len(files)} files:")
    for path, share in zip(files, result.shares, strict=True):
        print(f"  {100 * share:6.2f} %  {printable(str(path))}")
    if result.copied:
        print(f"Copied from the last file: {abridge(result.copied)}.")
    print(f"Written: {printable(str(output))}")
    if result.statistics and not is_refreshed:
        print(refresh_hint(result.statistics))
