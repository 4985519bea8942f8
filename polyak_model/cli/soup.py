"""`polyak-model soup`: average those of several weights that score best together."""

import contextlib
import pathlib
import typing

from polyak_model.cli.output_file import check_output, told_in_one_line
from polyak_model.cli.tables import format_table
from polyak_model.errors import InputError
from polyak_model.saving.wrapper_reader import check_plain
from polyak_model.soups import MODES, greedy_soup
from polyak_model.weight_files.atomic_write import atomic_file
from polyak_model.weight_files.batch_norm_layers import find_batch_statistics
from polyak_model.weight_files.compatibility import check_alike, check_places
from polyak_model.weight_files.npz import load_held_out
from polyak_model.weight_files.reader import open_weights

ENDINGS = (".weights.h5", ".keras")
BATCH_SIZE = 32


def register(app):
    """Adds the command to a typer app.

    Args:
        app: A `typer.Typer`.
    """
    import typer

    @app.command()
    def soup(
        model: typing.Annotated[
            pathlib.Path,
            typer.Argument(metavar="MODEL.keras", help="A model of their architecture."),
        ],
        candidates: typing.Annotated[
            list[pathlib.Path],
            typer.Argument(
                metavar="CANDIDATES...", help=".weights.h5 or .keras files to choose from."
            ),
        ],
        data: typing.Annotated[
            pathlib.Path,
            typer.Option(
                metavar="FILE.npz",
                help="Held-out data: arrays x and y; x0, x1 and so on for several inputs.",
            ),
        ],
        output: typing.Annotated[
            pathlib.Path,
            typer.Option(
                "--output",
                "-o",
                help="The .keras or .weights.h5 file to write; replaces one of that name.",
            ),
        ],
        metric: typing.Annotated[
            str,
            typer.Option(
                help="What is scored: loss, a metric of the model or one that Keras knows."
            ),
        ] = "loss",
        mode: typing.Annotated[
            str | None,
            typer.Option(
                metavar="max|min",
                help="Whether a larger or a smaller score is better. Without it: what Keras says.",
            ),
        ] = None,
        batch_size: typing.Annotated[
            int, typer.Option(help="How many examples are scored at a time.")
        ] = BATCH_SIZE,
    ):
        """Average those of several fine-tuned weights that make a model no worse: a greedy soup.

        They are tried in the order of their own scores, and each stays if the uniform average
        with it scores no worse than without (Wortsman et al. 2022, Model soups, Recipe 1).
        """
        run_soup(model, candidates, data, output, metric, mode, batch_size)


def run_soup(model, candidates, data, output, metric, mode, batch_size):
    """Checks everything, then tries the candidates, writes the soup and prints what came of each.

    Args:
        model: Path of a `.keras` file.
        candidates: Paths of weight files.
        data: Path of an .npz file.
        output: Path of the file to write.
        metric: Name of the metric.
        mode: `"max"`, `"min"` or None.
        batch_size: Int.

    Raises:
        InputError: If something cannot be used; nothing is written then.
    """
    check_options(mode, batch_size)
    check_output(output, ENDINGS, model)
    config, has_statistics = check_files(model, candidates, output)
    held_out = load_held_out(data)

    # Keras takes seconds to import, and wrong input should be told at once.
    from polyak_model.scoring import Scorer, load_model

    scorer = Scorer(load_model(model, config), held_out, metric, batch_size)
    mode = mode or scorer.direction()
    if mode is None:
        raise InputError(
            f"`--mode` must be given for the metric {metric!r}: Keras does not say whether larger "
            "or smaller values of it are better. Add --mode max or --mode min."
        )
    try:
        soup = greedy_soup(
            {str(path): lambda path=path: scorer.read(path) for path in candidates},
            scorer.score,
            mode,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    scorer.assign(soup.weights)
    with told_in_one_line(), atomic_file(output) as partial:
        scorer.save(partial)
    print(describe(soup, metric))
    if has_statistics and sum(trial.kept for trial in soup.trials) > 1:
        print(
            "\nBatchNormalization: the averaged statistics do not fit the averaged weights. "
            "Refresh them by a pass over training data."
        )
    print(f"\nWritten: {output}")


def check_options(mode, batch_size):
    """Checks the options that need no file.

    Args:
        mode: `"max"`, `"min"` or None.
        batch_size: Int, at least 1.

    Raises:
        InputError: If one is out of its range.

    Example:

    >>> check_options(mode="best", batch_size=32)
    Traceback (most recent call last):
    ...
    polyak_model.errors.InputError: `--mode` must be one of max, min. Received: 'best'. Try \
--mode max.
    """
    if mode not in (None, *MODES):
        raise InputError(f"`--mode` must be one of max, min. Received: {mode!r}. Try --mode max.")
    if batch_size < 1:
        raise InputError(
            f"`--batch-size` must be at least 1. Received: {batch_size}. "
            f"Try --batch-size {BATCH_SIZE}."
        )


def check_files(model, candidates, output):
    """Checks that the candidates are weights of the model, and that none would be replaced.

    Args:
        model: Path of a `.keras` file.
        candidates: Paths of weight files.
        output: Path of the file to write.

    Returns:
        The config of the model, a dict; and whether it has BatchNormalization.

    Raises:
        InputError: If one cannot be used.
    """
    _check_ending(model, "MODEL.keras", (".keras",))
    for path in candidates:
        _check_ending(path, "CANDIDATES", ENDINGS)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in (model, *candidates)]
        check_plain(files)
        check_places(files[1:], output)
        check_alike(files)
        return files[0].config, bool(find_batch_statistics(files[0]))


def _check_ending(path, argument, endings):
    if not str(path).endswith(endings):
        raise InputError(
            f"`{argument}` must be named {' or '.join(f'*{ending}' for ending in endings)}. "
            f"Received: {str(path)!r}. Save it with Keras under such a name."
        )


def describe(soup, metric):
    """Writes what came of each candidate as a table, and the score of the soup.

    Args:
        soup: A `Soup`.
        metric: Name of the metric.

    Example:

    >>> from polyak_model.soups import Soup, Trial
    >>> trials = [Trial("b.keras", 0.9, 0.9, True), Trial("a.keras", 0.8, 0.7, False)]
    >>> print(describe(Soup([], 0.9, trials), "accuracy"))
    candidate  accuracy  soup with it  kept
    b.keras         0.9           0.9   yes
    a.keras         0.8           0.7    no
    <BLANKLINE>
    The soup of 1 of 2 candidates: accuracy 0.9. The best of them alone: 0.9.
    """
    rows = [
        [
            trial.name,
            f"{trial.own_score:.5g}",
            f"{trial.soup_score:.5g}",
            "yes" if trial.kept else "no",
        ]
        for trial in soup.trials
    ]
    kept = sum(trial.kept for trial in soup.trials)
    return (
        format_table(["candidate", metric, "soup with it", "kept"], rows)
        + f"\n\nThe soup of {kept} of {len(rows)} candidates: {metric} {soup.score:.5g}. "
        f"The best of them alone: {soup.trials[0].own_score:.5g}."
    )
