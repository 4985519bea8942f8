"""The file of a snapshot: the averages of one step, and a record of where they come from.

    record                        uint8, JSON
    averages/<name>/<path>        the weights, by the paths that Keras gives them in a file

The record has the keys `format`, `version` (of this package), `run`, `step`,
`iterations`, `period`, `sequence`, `groups` and `averages`. `groups` has the attributes
of the groups in a file of Keras by their paths; in format 1 the groups themselves have
them. `averages` has, for each average by name, its `rule`, the paths of its `averaged`
weights, and the `dtypes` of all weights in the model. Weights that are not averaged, such
as statistics and integers, are those of the average model as it was.
"""

import dataclasses
import json
import typing

import numpy as np

import polyak_model
from polyak_model.rules import Rule
from polyak_model.weight_files.keras_archive import parse_json
from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.writer import create_array, created_weights

FORMAT = 2
AVERAGES = "averages"
_RECORD = "record"
_LONGEST = 16 * 2**20


class Weight(typing.NamedTuple):
    """A weight of an average.

    Attributes:
        path: Its path in a file of Keras, a string.
        array: Its values: float32 or float64 if it is averaged.
        dtype: Its dtype in the model, as Keras names it.
        averaged: Bool. Whether the rule averages it.
    """

    path: str
    array: np.ndarray
    dtype: str
    averaged: bool


@dataclasses.dataclass(frozen=True)
class Record:
    """Where the averages of a snapshot come from.

    Attributes:
        run: String that identifies the training.
        step: Int, optimizer steps since averaging (re)started.
        iterations: Int, optimizer steps, as the optimizer counts them.
        period: Int, how often averaging was restarted before.
        sequence: Int, how many snapshots of the run were written before.
        rules: Dict from the name of each average to its `polyak_model.rules.Rule`.
        averaged: Dict from the name of each average to the list of the paths
            that are averaged.
        dtypes: Dict from the name of each average to a dict from path to dtype.
        groups: Dict from the path of a group to its attributes, a dict from
            strings to strings or numbers, which all averages have.
    """

    run: str
    step: int
    iterations: int
    period: int
    sequence: int
    rules: dict
    averaged: dict = dataclasses.field(default_factory=dict)
    dtypes: dict = dataclasses.field(default_factory=dict)
    groups: dict = dataclasses.field(default_factory=dict)


def write_snapshot(path, record, averages):
    """Writes a snapshot, in a folder that may contain other files for a while.

    Args:
        path: A `pathlib.Path` that ends in `.weights.h5`.
        record: A `Record`; what it says of weights is taken from `averages`.
        averages: Dict from the name of each average to a list of `Weight`s.

    Raises:
        OSError: If the file cannot be written.
    """
    described = {
        name: {
            "rule": _describe(record.rules[name]),
            "averaged": [weight.path for weight in weights if weight.averaged],
            "dtypes": {weight.path: weight.dtype for weight in weights},
        }
        for name, weights in averages.items()
    }
    contents = {
        "format": FORMAT,
        "version": polyak_model.__version__,
        "run": record.run,
        "step": record.step,
        "iterations": record.iterations,
        "period": record.period,
        "sequence": record.sequence,
        "groups": {group: attributes for group, attributes in record.groups.items() if attributes},
        "averages": described,
    }
    # In the newest format of HDF5 groups are smaller, and made in less time.
    with created_weights(path, like=None, libver="latest") as file:
        create_array(file, _RECORD, np.frombuffer(_dump(contents), "uint8"))
        for name, weights in averages.items():
            for weight in weights:
                create_array(file, f"{AVERAGES}/{name}/{weight.path}", weight.array)


def read_record(weights):
    """Reads the record of a snapshot, as untrusted input.

    Args:
        weights: A `WeightFile`.

    Returns:
        A `Record`.

    Raises:
        InputError: If the file is no snapshot, is damaged, was written by a
            newer version, or has a rule whose class is not defined.
    """
    variable = weights.variables.get(_RECORD)
    if variable is None or variable.dtype != "uint8" or variable.nbytes > _LONGEST:
        raise refusal(weights.path, "it is no snapshot", "Name files of AverageSnapshots")
    text = variable.read().tobytes()
    contents = parse_json(text, "its record", weights.path)
    number = _get(contents, "format", int, weights)
    if number > FORMAT:
        version = _get(contents, "version", str, weights)
        raise refusal(
            weights.path,
            f"polyak_model {version} wrote it in format {number}, newer than {FORMAT}",
            "Install that version or a newer one",
        )
    averages = _get(contents, AVERAGES, dict, weights)
    for each in averages.values():
        _check(isinstance(each, dict), "averages", weights)
    record = Record(
        _get(contents, "run", str, weights),
        _get(contents, "step", int, weights),
        _get(contents, "iterations", int, weights),
        _get(contents, "period", int, weights),
        _get(contents, "sequence", int, weights),
        {name: _read_rule(_get(a, "rule", dict, weights), weights) for name, a in averages.items()},
        {name: _get(a, "averaged", list, weights) for name, a in averages.items()},
        {name: _get(a, "dtypes", dict, weights) for name, a in averages.items()},
        _get(contents, "groups", dict, weights) if number > 1 else {},
    )
    _check(record.step >= 1, "step", weights)
    _check(averages, AVERAGES, weights)
    for attributes in record.groups.values():
        _check(isinstance(attributes, dict), "groups", weights)
        for value in attributes.values():
            values = value if isinstance(value, list) else [value]
            _check(all(isinstance(each, str | int | float) for each in values), "groups", weights)
    return record


def _dump(contents):
    # The attributes of groups may be NumPy's.
    return json.dumps(contents, default=lambda value: value.tolist()).encode()


def _describe(rule):
    kind = type(rule)
    return {
        "module": kind.__module__,
        "class_name": kind.__qualname__,
        "config": rule.get_config(),
    }


def _read_rule(described, weights):
    # Only classes that are defined already: nothing is imported for a file.
    for kind in _subclasses(Rule):
        if [kind.__module__, kind.__qualname__] == [
            described.get("module"),
            described.get("class_name"),
        ]:
            try:
                return kind.from_config(_get(described, "config", dict, weights))
            except (TypeError, ValueError) as error:
                raise refusal(weights.path, f"its rule is invalid ({error})") from error
    raise refusal(
        weights.path,
        f"its rule is of the unknown class {described.get('class_name')!r}",
        "Import the module that defines it first",
    )


def _subclasses(kind):
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _get(contents, key, kind, weights):
    value = contents.get(key)
    _check(isinstance(value, kind) and not isinstance(value, bool), key, weights)
    return value


def _check(is_valid, key, weights):
    if not is_valid:
        raise refusal(weights.path, f"its record is damaged at {key!r}", "Leave it out")
