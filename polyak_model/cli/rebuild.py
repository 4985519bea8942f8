"""`polyak-model rebuild`: write an average of another length, from snapshots."""

import pathlib
import typing

import typer

from polyak_model.cli.hints import refresh_hint
from polyak_model.cli.progress import show_progress
from polyak_model.cli.refreshing import refreshing
from polyak_model.cli.targets import describe_rule, make_rule
from polyak_model.errors import InputError, printable
from polyak_model.snapshots import rebuilding
from polyak_model.weight_files.output import check_output


def rebuild(
    folder: typing.Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="The folder of an AverageSnapshots callback.",
        ),
    ],
    rule: typing.Annotated[
        typing.Literal["power", "exponential", "uniform", "polynomial"] | None,
        typer.Option(help="The rule to rebuild. Default: the one that the length belongs to."),
    ] = None,
    relative_width: typing.Annotated[
        float | None,
        typer.Option(metavar="S", help="Length of --rule power, in (0, 0.2887]."),
    ] = None,
    gamma: typing.Annotated[
        float | None,
        typer.Option(metavar="GAMMA", help="Length of --rule power, instead of --relative-width."),
    ] = None,
    half_life: typing.Annotated[
        float | None,
        typer.Option(metavar="N", help="Length of --rule exponential, in optimizer steps."),
    ] = None,
    decay: typing.Annotated[
        float | None,
        typer.Option(metavar="D", help="Length of --rule exponential, instead of --half-life."),
    ] = None,
    eta: typing.Annotated[
        float | None, typer.Option(metavar="ETA", help="Exponent of --rule polynomial.")
    ] = None,
    start_step: typing.Annotated[
        int, typer.Option(metavar="N", min=0, help="The step at which averaging begins.")
    ] = 0,
    step: typing.Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The step at which the average ends. Default: the last snapshot's."
        ),
    ] = None,
    max_error: typing.Annotated[
        float,
        typer.Option(
            metavar="E",
            min=0,
            help="The largest expected error, relative to the distance from the raw weights.",
        ),
    ] = 0.05,
    output: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write: .weights.h5 or, with --like, .keras. An existing one is "
            "replaced. Default: none, only the errors are printed.",
        ),
    ] = None,
    like: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="MODEL.keras",
            exists=True,
            dir_okay=False,
            help="A plain model of the architecture.",
        ),
    ] = None,
    refresh: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE.npz",
            exists=True,
            dir_okay=False,
            help="Training data, an array x, to refresh BatchNormalization statistics. Needs "
            "--like.",
        ),
    ] = None,
    quiet: typing.Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Rebuild an average of another length from the snapshots of a training.

    Its expected error is printed, and nothing is written if that exceeds --max-error.
    """
    lengths = {
        "relative-width": relative_width,
        "gamma": gamma,
        "half-life": half_life,
        "decay": decay,
        "eta": eta,
    }
    target = make_rule(rule, lengths, start_step)
    if refresh is not None:
        if like is None or output is None:
            raise InputError(
                "`--refresh` needs --like, the architecture, and --output. Received: "
                f"--refresh {refresh}. Add them."
            )
        check_output(output, (".keras", ".weights.h5"), [like])
    with show_progress("Rebuilding", quiet) as update, refreshing(output, refresh) as path:
        rebuilt = rebuilding.rebuild(folder, target, path, like, step, max_error, update)
    if not quiet:
        print(describe(rebuilt))
        if output is not None:
            print(f"Written: {printable(str(output))}")
        if refresh is None and rebuilt.statistics:
            print(refresh_hint(rebuilt.statistics))


def describe(rebuilt):
    """Returns what is known of a rebuilt average, a string of a few lines.

    Args:
        rebuilt: A `polyak_model.snapshots.rebuilding.Rebuilt`.
    """
    lines = [
        f"Average: {describe_rule(rebuilt.rule)}, at step {rebuilt.step:,}, from "
        f"{rebuilt.snapshots} snapshots.",
        f"It differs from the true one by about {100 * rebuilt.walk_error:.2g} % of its distance "
        f"from the raw weights (profile error {rebuilt.profile_error:.2g}, rounding "
        f"{rebuilt.rounding:.3g}).",
        *rebuilt.notes,
    ]
    return "\n".join(lines)
