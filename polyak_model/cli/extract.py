"""`polyak-model extract`: write an average or the raw model of a PolyakModel's file."""

import pathlib
import typing

import typer

from polyak_model.errors import printable
from polyak_model.saving import extraction
from polyak_model.weight_files.output import check_output
from polyak_model.weight_files.reader import find_kind, open_weights


def extract(
    file: typing.Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A .keras or .weights.h5 file that PolyakModel.save or save_weights wrote.",
        ),
    ],
    output: typing.Annotated[
        pathlib.Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The .keras, .weights.h5 or .safetensors file to write. An existing one is "
            "replaced.",
        ),
    ],
    contents: typing.Annotated[
        str, typer.Option(metavar="NAME", help="The model: average, the name of one, or raw.")
    ] = "average",
    quiet: typing.Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Write an average or the raw model as a plain Keras file.

    Keras loads it without polyak_model.
    """
    # Only a .keras file contains the architecture.
    is_archive = find_kind(file) == ".keras"
    endings = (*[".keras"] * is_archive, ".weights.h5", ".safetensors")
    check_output(output, endings, sources=[file])
    with open_weights(file) as weights:
        extraction.extract(weights, contents, output)
    if not quiet:
        print(f"Written: {printable(str(output))}")
