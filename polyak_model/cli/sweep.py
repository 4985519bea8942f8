"""`polyak-model sweep`: score averages of several lengths, and write the best."""

import csv
import pathlib
import typing

import typer
from typer.core import TyperCommand

from polyak_model.cli.average_options import join_numbers, parse_numbers
from polyak_model.cli.checks import require
from polyak_model.cli.hints import refresh_hint
from polyak_model.cli.progress import show_progress
from polyak_model.cli.tables import print_table
from polyak_model.cli.targets import describe_rule, make_rule
from polyak_model.errors import InputError, printable
from polyak_model.snapshots import sweeping
from polyak_model.weight_files.npz import load_held_out, load_inputs
from polyak_model.weight_files.output import check_output, writing

LENGTHS = ("relative-width", "half-life", "decay")
_NUMBERS = ("--relative-widths", "--half-lives", "--decays", "--steps")


class Command(TyperCommand):
    """Accepts several numbers after each of the options that list some."""

    def parse_args(self, context, arguments):
        for option in _NUMBERS:
            arguments = join_numbers(arguments, option)
        return super().parse_args(context, arguments)


def sweep(
    folder: typing.Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="The folder of an AverageSnapshots callback.",
        ),
    ],
    data: typing.Annotated[
        pathlib.Path,
        typer.Option(
            metavar="FILE.npz",
            exists=True,
            dir_okay=False,
            help="Held-out data: arrays x and y; x0, x1 and so on for several inputs.",
        ),
    ],
    like: typing.Annotated[
        pathlib.Path,
        typer.Option(
            metavar="MODEL.keras",
            exists=True,
            dir_okay=False,
            help="A plain model of the architecture.",
        ),
    ],
    relative_widths: typing.Annotated[
        str | None,
        typer.Option(metavar="S1 S2 ...", help="Power averages of these relative widths."),
    ] = None,
    half_lives: typing.Annotated[
        str | None,
        typer.Option(metavar="N1 N2 ...", help="Exponential averages of these half-lives."),
    ] = None,
    decays: typing.Annotated[
        str | None, typer.Option(metavar="D1 D2 ...", help="Exponential averages of these decays.")
    ] = None,
    steps: typing.Annotated[
        str | None,
        typer.Option(
            metavar="N1 N2 ...",
            help="The steps at which averages end. Default: the last snapshot's.",
        ),
    ] = None,
    metric: typing.Annotated[
        str,
        typer.Option(
            metavar="NAME", help="loss, a metric of the model, or one that Keras knows by its name."
        ),
    ] = "loss",
    mode: typing.Annotated[
        typing.Literal["min", "max"] | None,
        typer.Option(help="Whether a smaller or a larger score is better. Default: as in Keras."),
    ] = None,
    output: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write the best average: .keras or .weights.h5. Default: nowhere.",
        ),
    ] = None,
    refresh: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE.npz",
            exists=True,
            dir_okay=False,
            help="Training data, an array x, to refresh BatchNormalization statistics.",
        ),
    ] = None,
    max_error: typing.Annotated[
        float,
        typer.Option(metavar="E", min=0, help="Averages with a larger error are not scored."),
    ] = 0.05,
    table: typing.Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE.csv", help="Where to write the table.")
    ] = None,
    plot: typing.Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE.png", help="Where to plot the scores. Needs matplotlib."),
    ] = None,
    batch_size: typing.Annotated[
        int, typer.Option(metavar="N", min=1, help="The number of examples per batch.")
    ] = 32,
    quiet: typing.Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Score averages of several lengths on held-out data, and write the best.

    Each is rebuilt from the snapshots of one training.
    """
    rules = make_rules(dict(zip(LENGTHS, (relative_widths, half_lives, decays), strict=True)))
    sources = [like, data]
    for path, endings in ((table, (".csv",)), (plot, (".png", ".pdf", ".svg"))):
        if path is not None:
            check_output(path, endings, sources)
    if plot is not None:
        require("matplotlib", "demo")
    held_out = load_held_out(data)
    inputs = None if refresh is None else load_inputs(refresh)
    with show_progress("Scoring", quiet) as update:
        result = sweeping.sweep(
            folder,
            rules,
            held_out,
            metric,
            mode,
            like=like,
            output=output,
            steps=None if steps is None else _parse_steps(steps),
            refresh=inputs,
            max_error=max_error,
            batch_size=batch_size,
            progress=update,
        )
    if table is not None:
        _write_table(result.rows, metric, table)
    if plot is not None:
        from polyak_model.cli.sweep_plot import draw

        with writing(plot) as partial:
            draw(result, metric, partial)
    if not quiet:
        _report(result, metric, is_refreshed=refresh is not None)
        for path in filter(None, (output, table, plot)):
            print(f"Written: {printable(str(path))}")


def make_rules(lengths):
    """Returns the rules that the options of the command list.

    Args:
        lengths: Dict from the name of an option in the singular to its value, or
            None.

    Raises:
        InputError: If none is given, or a length is out of range.

    Example:

    >>> [rule.decay for rule in make_rules({"decay": "0.9,0.99", "half-life": None})]
    [0.9, 0.99]
    """
    rules = []
    for name, text in lengths.items():
        if text is not None:
            numbers = parse_numbers(text)
            if numbers is None:
                raise InputError(f"The lengths must be numbers. Received: {text}. Try 0.05 0.1.")
            rules += [make_rule(None, {name: number}) for number in numbers]
    if not rules:
        raise InputError(
            "There must be averages to score. Received: none. Try --relative-widths 0.05 0.1 0.2."
        )
    return rules


def _parse_steps(text):
    numbers = parse_numbers(text)
    if numbers is None or not all(number.is_integer() for number in numbers):
        raise InputError(f"`--steps` must be integers. Received: {text}. Try --steps 1000 2000.")
    return [int(number) for number in numbers]


def _cells(row):
    numbers = (row.score, row.standard_error, row.walk_error, row.profile_error, row.rounding)
    return ["" if number is None else f"{number:.5g}" for number in numbers]


def _report(result, metric, is_refreshed):
    rows = [[describe_rule(row.rule), f"{row.step:,}", *_cells(row)] for row in result.rows]
    header = ["average", "step", metric, "± error", "walk error", "profile error", "rounding"]
    print_table(header, rows)
    best = result.best
    print(
        f"\nThe best: {describe_rule(best.rule)}, at step {best.step:,}, {printable(metric)} "
        f"{best.score:.5g}."
    )
    if result.close:
        print(
            f"{result.close} of the others lie within one standard error of it: on this much data "
            "the choice between them is chance."
        )
    unscored = sum(row.score is None for row in result.rows)
    if unscored:
        print(f"Not scored, since the walk error exceeds --max-error: {unscored}.")
    for note in result.notes:
        print(printable(note))
    if result.statistics and not is_refreshed:
        print(refresh_hint(result.statistics))


def _write_table(rows, metric, path):
    header = ["rule", "step", metric, "standard_error", "profile_error", "walk_error", "rounding"]
    with writing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            errors = (row.profile_error, row.walk_error, row.rounding)
            writer.writerow([repr(row.rule), row.step, row.score, row.standard_error, *errors])
