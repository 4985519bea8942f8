"""The application `polyak-model` and its entry point."""

import sys
import typing

import polyak_model
from polyak_model.cli.checks import require
from polyak_model.errors import InputError

NAME = "polyak-model"


def main(arguments=None):
    """Runs the command `polyak-model`.

    Args:
        arguments: List of strings. Defaults to None: the arguments of the process.

    Returns:
        The exit code: 0 on success; 2 if the input cannot be used, which one
        line on stderr explains; 130 if the user interrupted it.
    """
    try:
        return _run(arguments)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _run(arguments):
    require("typer", "cli")
    import typer

    # The base class is defined by Click in older versions of typer, by typer itself in newer ones.
    (usage_error,) = typer.BadParameter.__bases__
    try:
        return build_app()(arguments, prog_name=NAME, standalone_mode=False) or 0
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else NAME
        raise InputError(f"{_describe(error)} See {command} --help") from error


def _describe(error):
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    # Newer versions of typer validate with pydantic, whose messages leave out the value.
    details = getattr(error.__cause__, "errors", list)()
    received = [repr(each["input"]) for each in details if repr(each["input"]) not in message]
    if received:
        message += f". Received: {', '.join(received)}"
    return message if message.endswith("?") else f"{message}."


def build_app():
    """Builds the typer app.

    typer is an optional dependency, so it is imported here and not with this module.

    Returns:
        A `typer.Typer`.
    """
    import typer

    from polyak_model.cli import average, extract, inspect, rebuild, soup, sweep
    from polyak_model.cli.demo import command as demo

    app = typer.Typer(
        rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
    )

    def print_version(is_given: bool):
        if is_given:
            print(f"{NAME} {polyak_model.__version__}")
            raise typer.Exit

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: typing.Annotated[
            bool,
            typer.Option(
                "--version", callback=print_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ):
        """Running averages of the weights of Keras models."""
        if context.invoked_subcommand is None:
            print(context.get_help())

    app.command(cls=average.Command)(average.average)
    app.command(cls=sweep.Command)(sweep.sweep)
    for function in (demo.demo, extract.extract, inspect.inspect, rebuild.rebuild, soup.soup):
        app.command()(function)
    return app
