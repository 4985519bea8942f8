"""`polyak-model inspect`: what a weight file holds."""

import math
import pathlib
import typing

from polyak_model.cli.tables import format_table, printable
from polyak_model.saving.distances import measure_distances, measure_total
from polyak_model.saving.wrapper_reader import find_wrappers, read_rule, read_step
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.refusal import in_one_line
from polyak_model.weight_files.training_state import split_variables


def register(app):
    """Adds the command to a typer app.

    Args:
        app: A `typer.Typer`.
    """
    import typer

    @app.command()
    def inspect(
        file: typing.Annotated[
            pathlib.Path,
            typer.Argument(metavar="FILE", help="A .weights.h5, .keras or .weights.json file."),
        ],
    ):
        """List the variables of a weight file, and how far its average lies from the raw model."""
        run_inspect(file)


def run_inspect(file):
    """Prints what a weight file holds.

    Args:
        file: Its path.

    Raises:
        InputError: If it cannot be used.
    """
    with open_weights(file) as weights:
        wrappers = find_wrappers(weights)
        paragraphs = [_describe_variables(weights, wrappers)]
        for wrapper in wrappers:
            paragraphs += _describe_wrapper(weights, wrapper)
    print("\n\n".join(paragraphs))


def _describe_variables(weights, wrappers):
    whole = [wrapper for wrapper in wrappers if not wrapper.path]
    group = whole[0].raw if whole else ""
    model, optimizers = split_variables(weights, group)
    title = "The raw model; the average model has the same variables" if whole else "The model"
    names = {path: attributes.get("name", "") for path, attributes in weights.attributes.items()}
    rows = [
        [name, _name_of(variable, names), str(variable.shape), variable.dtype, _count([variable])]
        for name, variable in model.items()
    ]
    rows.append(["total", "", "", "", _count(model.values())])
    header = ["variable", "layer", "shape", "dtype", "parameters"]
    lines = [f"{title}:\n", format_table(header, rows, left=4)]
    if optimizers:
        of = {_name_of(variable, names) for variable in optimizers.values()} - {""}
        kind = f" {' and '.join(sorted(of))}" if of else ""
        lines.append(
            f"\nOptimizer{kind}: {len(optimizers)} variables, "
            f"{_count(optimizers.values())} parameters."
        )
    return "\n".join(lines)


def _name_of(variable, names):
    return printable(str(names.get(variable.name.rpartition("/")[0], "")))


def _count(variables):
    return f"{sum(math.prod(variable.shape) for variable in variables):,}"


def _describe_wrapper(weights, wrapper):
    at = f" at {printable(wrapper.path)}" if wrapper.path else ""
    rule = read_rule(weights, wrapper)
    distances = measure_distances(weights, wrapper)
    rows = [
        [each.layer, f"{each.distance:.4g}", f"{each.relative:.4g}"]
        for each in (*distances, measure_total(distances))
    ]
    yield (f"The average{at}:\n\nrule  {_format_rule(rule)}\nstep  {read_step(weights, wrapper):,}")
    yield "Its distance from the raw model:\n\n" + format_table(
        ["layer", "distance", "relative"], rows
    )


def _format_rule(rule):
    if rule is None:
        return "not written in this file"
    settings = ", ".join(f"{name}={value}" for name, value in rule["config"].items())
    return printable(in_one_line(f"{rule['class_name']}({settings})"))
