"""`polyak-model inspect`: what a weight file contains."""

import json
import math
import pathlib
import typing

import typer

from polyak_model.cli.inspect_folder import describe_folder, print_folder
from polyak_model.cli.tables import print_table
from polyak_model.errors import printable
from polyak_model.saving import layout
from polyak_model.saving.distances import measure_distances, measure_total
from polyak_model.saving.sharing_reader import find_shared_variables
from polyak_model.saving.wrapper_reader import (
    find_wrappers,
    read_description,
    read_rules,
    read_step,
)
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.refusal import in_one_line
from polyak_model.weight_files.training_state import split_variables


def inspect(
    file: typing.Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            help="A .keras, .weights.h5, .weights.json or .safetensors file; or the folder of an "
            "AverageSnapshots callback.",
        ),
    ],
    as_json: typing.Annotated[
        bool, typer.Option("--json", help="Print JSON for other programs.")
    ] = False,
):
    """Show the variables and averages of a weight file.

    For each average: its rule, its step and its distance from the raw model. For a folder of
    snapshots: the run, the steps, and the averages that can be rebuilt.
    """
    is_folder = file.is_dir()
    if is_folder:
        description = describe_folder(file)
    else:
        with open_weights(file) as weights:
            description = describe(weights)
    if as_json:
        # JSON has neither inf nor NaN.
        text = json.dumps({"file": str(file), **description})
        print(json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2))
    elif is_folder:
        print_folder(description)
    else:
        _print(description)


def describe(weights):
    """Describes a weight file in types that JSON knows.

    Args:
        weights: A `WeightFile`.

    Returns:
        A dict with `variables`, those of the raw model if the file is of a
        PolyakModel; their number of `parameters`; `optimizer`, a dict or None;
        and `averages`, a list of dicts by `name`. The `path` of an average is that of its
        PolyakModel inside the saved model, "" if that is the saved model.

    Raises:
        InputError: If the file is damaged.
    """
    wrappers = find_wrappers(weights)
    group = wrappers[0].raw if wrappers and not wrappers[0].path else ""
    model, optimizer = split_variables(weights, group)
    model = {path: variable for path, variable in model.items() if not layout.is_lora_alpha(path)}
    names = {path: attributes.get("name", "") for path, attributes in weights.attributes.items()}

    def name_of(variable):
        return str(names.get(variable.name.rpartition("/")[0], ""))

    return {
        "variables": [
            {
                "path": path,
                "layer": name_of(variable),
                "shape": list(variable.shape),
                "dtype": variable.dtype,
                "parameters": math.prod(variable.shape),
            }
            for path, variable in model.items()
        ],
        "parameters": _count(model),
        "optimizer": {
            "names": sorted({name_of(variable) for variable in optimizer.values()} - {""}),
            "variables": len(optimizer),
            "parameters": _count(optimizer),
        }
        if optimizer
        else None,
        "averages": [
            _describe_average(weights, wrapper, name, rule)
            for wrapper in wrappers
            for name, rule in read_rules(weights, wrapper).items()
        ],
    }


def _count(variables):
    return sum(math.prod(variable.shape) for variable in variables.values())


def _describe_average(weights, wrapper, name, rule):
    shared = find_shared_variables(weights, wrapper, wrapper.averages[name])
    distances = measure_distances(weights, wrapper.raw, wrapper.averages[name], shared)
    description = read_description(weights, wrapper) or {}
    return {
        "path": wrapper.path,
        "name": name,
        "rule": rule,
        "step": read_step(weights, wrapper),
        "excluded": len(description.get("excluded", ())),
        "shared": len(description.get("shared", ())),
        "distances": [
            {"layer": each.layer, "distance": each.distance, "relative": each.relative}
            for each in (*distances, measure_total(distances))
        ],
    }


def _print(description):
    averages = description["averages"]
    is_wrapper = bool(averages) and not averages[0]["path"]
    title = "The raw model; averages have the same variables" if is_wrapper else "The model"
    print(f"{title}:\n")
    rows = []
    for each in description["variables"]:
        shape, count = str(tuple(each["shape"])), f"{each['parameters']:,}"
        rows.append([each["path"], each["layer"], shape, each["dtype"], count])
    rows.append(["total", "", "", "", f"{description['parameters']:,}"])
    print_table(["variable", "layer", "shape", "dtype", "parameters"], rows, left=4)
    optimizer = description["optimizer"]
    if optimizer:
        name = printable(" ".join(["Optimizer", " and ".join(optimizer["names"])]).rstrip())
        print(
            f"\n{name}: {optimizer['variables']} variables, {optimizer['parameters']:,} parameters."
        )
    for average in averages:
        _print_average(average)


def _print_average(average):
    name = "" if average["name"] == layout.ONLY else f" '{average['name']}'"
    place = f" at {printable(average['path'])}" if average["path"] else ""
    print(f"\nThe average{name}{place}:\n")
    print(f"rule  {_format_rule(average['rule'])}\nstep  {average['step']:,}")
    if average["excluded"]:
        print(f"excluded  {average['excluded']:,} weights, which mirror the raw ones")
    if average["shared"]:
        print(f"shared    {average['shared']:,} weights, which are the raw ones")
    print("\nIts distance from the raw model:\n")
    rows = [
        [each["layer"], f"{each['distance']:.4g}", f"{each['relative']:.4g}"]
        for each in average["distances"]
    ]
    print_table(["layer", "distance", "relative"], rows)


def _format_rule(rule):
    if rule is None:
        return "not written in this file"
    settings = ", ".join(f"{name}={value}" for name, value in rule["config"].items())
    return in_one_line(f"{rule['class_name']}({settings})")
