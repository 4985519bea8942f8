"""The commands; the work is done by the modules below this one."""

import sys

from polyak_model.cli import average, extract, inspect, soup
from polyak_model.cli.checks import require
from polyak_model.cli.demo import command as demo
from polyak_model.errors import InputError

NAME = "polyak-model"
COMMANDS = (average, demo, extract, inspect, soup)


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
    require("typer", "cli")
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

    for command in COMMANDS:
        command.register(app)
    return app
