"""`polyak-model average`: average weight files after the fact."""

import contextlib
import pathlib
import sys
import time
import typing

from polyak_model.checkpoints import average_files
from polyak_model.cli.average_options import choose_files, choose_weights, join_weights

_PATIENCE_SECONDS = 2
_REFRESH = (
    "BatchNormalization: the averaged statistics of {layers} do not fit the averaged weights. "
    "Refresh them: load the model and call `polyak_model.refresh_statistics(model, data)` with "
    "training data."
)


def register(app):
    """Adds the command to a typer app.

    Args:
        app: A `typer.Typer`.
    """
    import typer
    from typer.core import TyperCommand

    class ManyWeights(TyperCommand):
        """Takes all numbers after `--weights` as its value."""

        def parse_args(self, context, arguments):
            return super().parse_args(context, join_weights(arguments))

    @app.command(cls=ManyWeights)
    def average(
        files: typing.Annotated[
            list[str],
            typer.Argument(
                metavar="FILES",
                help="Files that Keras saved, .keras, .weights.h5 or .weights.json; or one folder "
                "of them, with --last or --best.",
            ),
        ],
        output: typing.Annotated[
            pathlib.Path,
            typer.Option(
                "--output",
                "-o",
                help="File to write: .weights.h5, or .keras from .keras files.",
            ),
        ],
        weights: typing.Annotated[
            str | None,
            typer.Option(
                metavar="W1 W2 ...", help="What each file counts, relative to the others."
            ),
        ] = None,
        rule: typing.Annotated[
            str,
            typer.Option(
                help="What the files count, in their order: uniform, exponential (with --decay), "
                "polynomial or power."
            ),
        ] = "uniform",
        decay: typing.Annotated[
            float | None, typer.Option(help="Of --rule exponential, in [0, 1).")
        ] = None,
        eta: typing.Annotated[
            float | None, typer.Option(help="Of --rule polynomial; 3 unless given.")
        ] = None,
        gamma: typing.Annotated[
            float | None, typer.Option(help="Of --rule power; 6.94 unless given.")
        ] = None,
        last: typing.Annotated[
            int | None,
            typer.Option(
                metavar="K", help="Only the last K by name; numbers count by value: 9 before 10."
            ),
        ] = None,
        best: typing.Annotated[
            int | None, typer.Option(metavar="K", help="Only the best K epochs, with --by.")
        ] = None,
        by: typing.Annotated[
            str | None,
            typer.Option(
                metavar="FILE.csv:COLUMN",
                help="What is best: a column of what keras.callbacks.CSVLogger wrote. Its epochs "
                "count from 0, those in the names of the files from 1.",
            ),
        ] = None,
        mode: typing.Annotated[
            str | None, typer.Option(help="min or max: which values of the column are best.")
        ] = None,
    ):
        """Average weight files after the fact, without loading a model."""
        chosen = choose_files(files, output, last, best, by, mode)
        options = {"decay": decay, "eta": eta, "gamma": gamma}
        run_average(chosen, output, choose_weights(len(chosen), weights, rule, options))


def run_average(files, output, weights):
    """Averages, and prints of what and where.

    Args:
        files: Paths, in order.
        output: Path of the file to write.
        weights: What each file counts.

    Raises:
        InputError: If something cannot be used; nothing is written then.
    """
    with _progress_bar() as progress:
        result = average_files(files, output, weights, progress)
    print(f"Averaged {len(files)} files:")
    for path, share in zip(files, result.shares, strict=True):
        print(f"  {100 * share:6.2f} %  {path}")
    if result.copied:
        print(f"Taken from the last file: {', '.join(result.copied)}.")
    print(f"Written: {output}")
    if result.statistics:
        print(_REFRESH.format(layers=_abridge(result.statistics)))


def _abridge(names):
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


@contextlib.contextmanager
def _progress_bar():
    """Yields a function of the share done; on a terminal it draws a bar after a while."""
    import typer

    if not sys.stderr.isatty():
        yield None
        return
    begin = time.monotonic()
    bar = None
    with contextlib.ExitStack() as stack:

        def progress(share):
            nonlocal bar
            if bar is None and time.monotonic() - begin > _PATIENCE_SECONDS:
                bar = stack.enter_context(
                    typer.progressbar(length=1000, label="Averaging", file=sys.stderr)
                )
            if bar is not None:
                bar.update(int(1000 * share) - bar.pos)

        yield progress
