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


def join_numbers(arguments, option):
    """Joins the numbers after an option into one argument, since an option takes one value.

    Args:
        arguments: List of strings.
        option: Name of the option.

    Returns:
        A list of strings.

    Example:

    >>> join_numbers(["a.keras", "--weights", "1", "2", "-o", "out.keras"], "--weights")
    ['a.keras', '--weights', '1,2', '-o', 'out.keras']
    """
    if option not in arguments:
        return arguments
    start = arguments.index(option) + 1
    end = start
    while end < len(arguments) and parse_numbers(arguments[end]) is not None:
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


def choose_weights(count, weights, rule, options, shape=None):
    """Returns the weights of the files, relative to each other.

    Args:
        count: Int, the number of files.
        weights: Value of `--weights`, or None.
        rule: Value of `--rule`.
        options: Dict from the name of each rule's option to its value, or None.
        shape: Value of `--shape`, or None.

    Returns:
        A sequence of `count` floats.

    Raises:
        InputError: If the options contradict each other or are out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if shape is not None and rule != "decay":
        raise InputError(f"`--shape` does not apply to --rule {rule}. Leave it out.")
    if weights is not None:
        if given or rule != "uniform":
            raise InputError(
                "`--weights` cannot be combined with `--rule` or its options. Received: both. "
                "Leave one out."
            )
        numbers = parse_numbers(weights)
        if numbers is None or not all(0 < number < math.inf for number in numbers):
            raise InputError(
                f"`--weights` must be positive finite numbers. Received: {weights}. "
                "Try --weights 1 2 3."
            )
        return numbers
    if rule == "decay":
        for name in given:
            raise InputError(f"`--{name}` does not apply to --rule decay. Leave it out.")
        return rules.decay_shares(shape or "linear", count).tolist()
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


def parse_numbers(text):
    """Returns the numbers in a comma-separated text, a list of floats; None if it is none.

    Example:

    >>> parse_numbers("1,2.5"), parse_numbers("a")
    ([1.0, 2.5], None)
    """
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return None
