"""The options of `polyak-model average`: which files to average, and their weights."""

import math
import os

from polyak_model import rules
from polyak_model.errors import InputError
from polyak_model.weight_files.selection import choose_best, choose_last, list_folder

# For each rule: its class, its option, and the default of that.
_RULES = {
    "uniform": (rules.UniformAverage, None, None),
    "exponential": (rules.ExponentialAverage, "decay", None),
    "polynomial": (rules.PolynomialAverage, "eta", 3),
    "power": (rules.PowerAverage, "gamma", 6.94),
}


def join_weights(arguments):
    """Joins the numbers after `--weights` into one argument, since an option takes one value.

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
    """Returns the files to average, in order.

    Args:
        files: Paths from the command line.
        output: Path of the file to write, which is never chosen from a folder.
        last: Value of `--last`, or None.
        best: Value of `--best`, or None.
        by: Value of `--by`, or None.
        mode: Value of `--mode`, or None.

    Raises:
        InputError: If the options contradict each other, or the files cannot be
            chosen.
    """
    if last is not None and best is not None:
        raise InputError("`--last` and `--best` cannot be combined. Received: both. Leave one out.")
    if len({option is None for option in (best, by, mode)}) > 1:
        raise InputError(
            "`--best`, `--by` and `--mode` must be given together, as in --best 5 --by "
            "history.csv:val_loss --mode min. Received: only some of them."
        )
    folders = [path for path in files if os.path.isdir(path)]
    if folders and (len(files) > 1 or last is best is None):
        raise InputError(
            f"A folder must be the only input, with --last or --best. Received: {folders[0]!s}. "
            f"To average all files in it, pass {os.path.join(folders[0], '*')}."
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
    return choose_best(files, best, history, column, mode)


def choose_weights(count, weights, rule, options):
    """Returns the weights of the files, relative to each other.

    Args:
        count: Int, the number of files.
        weights: Value of `--weights`, or None.
        rule: Value of `--rule`.
        options: Dict from the name of each rule's option to its value, or None.

    Returns:
        A sequence of `count` floats.

    Raises:
        InputError: If the options contradict each other or are out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if weights is not None:
        if given or rule != "uniform":
            raise InputError(
                "`--weights` cannot be combined with `--rule` or its options. Received: both. "
                "Leave one out."
            )
        numbers = _parse_numbers(weights)
        if numbers is None or not all(0 < number < math.inf for number in numbers):
            raise InputError(
                f"`--weights` must be positive finite numbers. Received: {weights}. "
                "Try --weights 1 2 3."
            )
        return numbers
    make, name, default = _RULES[rule]
    for other in given.keys() - {name}:
        raise InputError(f"`--{other}` does not apply to --rule {rule}. Leave it out.")
    if name is None:
        return rules.shares(make(), count).tolist()
    value = given.get(name, default)
    if value is None:
        raise InputError(f"`--rule {rule}` needs `--{name}`. Try --{name} 0.9.")
    try:
        return rules.shares(make(value), count).tolist()
    except ValueError as error:
        raise InputError(str(error)) from error


def _parse_numbers(text):
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return None
