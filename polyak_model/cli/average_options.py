"""What the options of `polyak-model average` mean."""

import os

from polyak_model import rules
from polyak_model.errors import InputError
from polyak_model.weight_files.selection import choose_best, choose_last, list_folder

_RULES = {
    "uniform": (rules.UniformAverage, None, None),
    "exponential": (rules.ExponentialAverage, "decay", None),
    "polynomial": (rules.PolynomialAverage, "eta", 3),
    "power": (rules.PowerAverage, "gamma", 6.94),
}


def join_weights(arguments):
    """Joins the numbers after `--weights` to one argument, as typer expects.

    Args:
        arguments: List of strings.

    Returns:
        A list of strings.

    Example:

    >>> join_weights(["a.keras", "--weights", "1", "2", "-o", "out.keras"])
    ['a.keras', '--weights', '1,2', '-o', 'out.keras']
    """
    if "--weights" not in arguments:
        return arguments
    start = arguments.index("--weights") + 1
    end = start
    while end < len(arguments) and _parse_numbers(arguments[end]) is not None:
        end += 1
    return [*arguments[:start], *filter(None, [",".join(arguments[start:end])]), *arguments[end:]]


def choose_files(files, output, last=None, best=None, by=None, mode=None):
    """Returns the files to average, in order, or raises `InputError`.

    Args:
        files: Paths as given on the command line.
        output: Where the average will be written.
        last: Value of the option, or None; so the others.
        best: Value of the option.
        by: Value of the option.
        mode: Value of the option.
    """
    if last is not None and best is not None:
        raise InputError("`--last` and `--best` exclude each other. Received: both. Leave one out.")
    if (best is None) != (by is None) or (best is None) != (mode is None):
        raise InputError(
            "`--best`, `--by` and `--mode` belong together, as in --best 5 --by "
            "history.csv:val_loss --mode min. Received: only some of them."
        )
    folders = [path for path in files if os.path.isdir(path)]
    if folders and (len(files) > 1 or last is best is None):
        raise InputError(
            f"{folders[0]!r} is a folder: it must be the only input, with --last or --best. For "
            f"all files in it name {os.path.join(folders[0], '*')}."
        )
    if folders:
        files = list_folder(folders[0], output)
    if last is not None:
        return choose_last(files, last)
    if best is None:
        return files
    history, colon, column = by.rpartition(":")
    if not colon or not column:
        raise InputError(
            f"`--by` must be FILE.csv:COLUMN. Received: {by}. Try history.csv:val_loss."
        )
    if mode not in ("min", "max"):
        raise InputError(f"`--mode` must be min or max. Received: {mode}. A loss needs --mode min.")
    return choose_best(files, best, history, column, mode)


def choose_weights(count, weights, rule, options):
    """Returns what each of `count` files counts, or raises `InputError`.

    Args:
        count: How many files there are.
        weights: Value of the option, or None.
        rule: Value of the option.
        options: A dict from the name of each option of the rules to its value,
            or None.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if weights is not None:
        if given or rule != "uniform":
            raise InputError(
                "`--weights` and `--rule` exclude each other. Received: both. Leave one out."
            )
        numbers = _parse_numbers(weights)
        if numbers is None or not all(0 < number < float("inf") for number in numbers):
            raise InputError(
                f"`--weights` must be positive finite numbers. Received: {weights}. "
                "Try --weights 1 2 3."
            )
        return numbers
    if rule not in _RULES:
        raise InputError(f"`--rule` must be one of {', '.join(_RULES)}. Received: {rule}.")
    form, name, default = _RULES[rule]
    for other in given.keys() - {name}:
        raise InputError(f"`--{other}` is no option of --rule {rule}. Leave it out.")
    if name is None:
        return rules.shares(form(), count).tolist()
    if name not in given and default is None:
        raise InputError(f"`--rule {rule}` needs `--{name}`. Try --{name} 0.9.")
    try:
        return rules.shares(form(given.get(name, default)), count).tolist()
    except ValueError as error:
        raise InputError(str(error)) from error


def _parse_numbers(text):
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return None
