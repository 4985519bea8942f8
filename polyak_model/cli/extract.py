"""`polyak-model extract`: a plain Keras model out of the file of a PolyakModel."""

import pathlib
import typing

from polyak_model.cli.output_file import check_output, told_in_one_line
from polyak_model.errors import InputError
from polyak_model.saving import extraction
from polyak_model.weight_files.reader import find_kind, open_weights


def register(app):
    """Adds the command to a typer app.

    Args:
        app: A `typer.Typer`.
    """
    import typer

    @app.command()
    def extract(
        file: typing.Annotated[
            pathlib.Path,
            typer.Argument(
                metavar="FILE", help="What PolyakModel.save or save_weights wrote: .keras, or .h5."
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
        contents: typing.Annotated[
            str, typer.Option(metavar="average|raw", help="Which of the two models.")
        ] = "average",
    ):
        """Write the average or the raw model as a plain Keras file, which needs no polyak_model."""
        run_extract(file, contents, output)


def run_extract(file, contents, output):
    """Checks everything, then writes the file and says so.

    Args:
        file: Path of the file of a PolyakModel.
        contents: `"average"` or `"raw"`.
        output: Path of the file to write.

    Raises:
        InputError: If something cannot be used; nothing is written then.
    """
    if contents not in extraction.CONTENTS:
        raise InputError(
            f"`--contents` must be one of average, raw. Received: {contents!r}. "
            "Try --contents average."
        )
    # Only a .keras file says of which layers the model is made.
    is_whole = find_kind(file) == ".keras"
    check_output(output, (".keras", ".weights.h5") if is_whole else (".weights.h5",), file)
    with open_weights(file) as weights, told_in_one_line():
        extraction.extract(weights, contents, output)
    print(f"Written: {output}")
