"""`polyak-model soup`: average those of several weight files that score best together."""

import contextlib
import pathlib
import typing

import typer

from polyak_model.cli.hints import refresh_hint
from polyak_model.cli.progress import show_progress
from polyak_model.cli.tables import print_table
from polyak_model.errors import InputError, printable
from polyak_model.saving.wrapper_reader import check_plain
from polyak_model.soups import greedy_soup
from polyak_model.weight_files.batch_norm_layers import find_batch_statistics
from polyak_model.weight_files.compatibility import check_alike, check_places
from polyak_model.weight_files.npz import load_held_out, load_inputs
from polyak_model.weight_files.output import check_output, writing
from polyak_model.weight_files.reader import open_weights

_ENDINGS = (".weights.h5", ".keras")


def soup(
    model: typing.Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="MODEL.keras",
            exists=True,
            dir_okay=False,
            help="A model of the candidates' architecture.",
        ),
    ],
    candidates: typing.Annotated[
        list[pathlib.Path],
        typer.Argument(
            metavar="CANDIDATES",
            exists=True,
            dir_okay=False,
            help="The .weights.h5 or .keras files to choose from.",
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
    output: typing.Annotated[
        pathlib.Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The .keras or .weights.h5 file to write. An existing one is replaced.",
        ),
    ],
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
    refresh: typing.Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE.npz",
            exists=True,
            dir_okay=False,
            help="Training data, an array x, to refresh BatchNormalization statistics at the end.",
        ),
    ] = None,
    batch_size: typing.Annotated[
        int, typer.Option(metavar="N", min=1, help="The number of examples per batch.")
    ] = 32,
    quiet: typing.Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Average the fine-tuned weights that score best together.

    This is a greedy soup (Wortsman et al. 2022, Model soups, Recipe 1).

    The candidates are tried in the order of their own scores. Each stays if the uniform average
    with it scores no worse than without it.
    """
    check_output(output, _ENDINGS, sources=[model])
    config, statistics = check_files(model, candidates, output)
    held_out = load_held_out(data)
    inputs = None if refresh is None else load_inputs(refresh)

    with show_progress("Loading the model", quiet) as update:
        # Keras takes seconds to import. Everything that can be checked without it comes before.
        from polyak_model.scoring import Scorer, load_model
        from polyak_model.snapshots.refreshing import refresh as refresh_model

        scorer = Scorer(load_model(model, config), held_out, metric, batch_size)
        cooked = _cook(scorer, candidates, mode or _find_mode(scorer, metric), update)
        scorer.assign(cooked.weights)
        if inputs is not None:
            refresh_model(scorer.model, inputs)
        with writing(output) as partial:
            scorer.save(partial)
    if not quiet:
        stale = statistics if refresh is None else []
        _report(cooked.trials, metric, cooked.score, stale)
        print(f"\nWritten: {printable(str(output))}")


def check_files(model, candidates, output):
    """Checks that the candidates are weights of the model, and that none would be replaced.

    Args:
        model: Path of a `.keras` file.
        candidates: Paths of weight files.
        output: Path of the file to write.

    Returns:
        Tuple of the config of the model, a dict, and the names of its
        BatchNormalization layers, a list.

    Raises:
        InputError: If a file cannot be used.
    """
    _check_ending(model, "MODEL.keras", (".keras",))
    for path in candidates:
        _check_ending(path, "CANDIDATES", _ENDINGS)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in (model, *candidates)]
        check_plain(files)
        check_places(files[1:], output)
        check_alike(files)
        return files[0].config, find_batch_statistics(files[0])


def _check_ending(path, argument, endings):
    if not str(path).endswith(endings):
        raise InputError(
            f"`{argument}` must be named {' or '.join(f'*{ending}' for ending in endings)}. "
            f"Received: {str(path)!r}. Save it with Keras under such a name."
        )


def _find_mode(scorer, metric):
    mode = scorer.direction()
    if mode is None:
        raise InputError(
            f"`--mode` must be given for the metric {metric!r}, since Keras does not define "
            "whether larger or smaller values of it are better. Add --mode max or --mode min."
        )
    return mode


def _cook(scorer, candidates, mode, update):
    # All candidates are scored alone, then all but the best in a soup.
    total = 2 * len(candidates) - 1
    done = 0

    def score(weights):
        nonlocal done
        update(done / total, "Scoring")
        done += 1
        return scorer.score(weights)

    readers = {str(path): lambda path=path: scorer.read(path) for path in candidates}
    try:
        return greedy_soup(readers, score, mode)
    except ValueError as error:
        raise InputError(str(error)) from error


def _report(trials, metric, score, statistics):
    rows = [
        [
            trial.name,
            f"{trial.own_score:.5g}",
            f"{trial.soup_score:.5g}",
            "yes" if trial.kept else "no",
        ]
        for trial in trials
    ]
    kept = sum(trial.kept for trial in trials)
    print_table(["candidate", metric, "soup with it", "kept"], rows)
    print(
        f"\nThe soup of {kept} of {len(trials)} candidates: {printable(metric)} {score:.5g}. "
        f"The best candidate alone: {trials[0].own_score:.5g}."
    )
    if statistics and kept > 1:
        print(f"\n{refresh_hint(statistics)}")
