"""Rebuilds an average of any length from the snapshots of a run, without Keras."""

import contextlib
import copy as shallow
import dataclasses
import os
import typing
from collections.abc import Callable

from polyak_model.errors import InputError, check_integer, is_number
from polyak_model.posthoc.basis import Basis
from polyak_model.posthoc.reach import find_count, find_nearest
from polyak_model.rules import Rule
from polyak_model.saving.sharing_reader import take_lora
from polyak_model.saving.wrapper_reader import check_plain
from polyak_model.snapshots.folder import opened_snapshots, read_run
from polyak_model.snapshots.record import AVERAGES
from polyak_model.weight_files.batch_norm_layers import find_batch_statistics
from polyak_model.weight_files.combine import combine, combine_several, copy
from polyak_model.weight_files.compatibility import check_alike
from polyak_model.weight_files.output import check_output, writing
from polyak_model.weight_files.reader import find_kind, open_weights
from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.training_state import (
    find_training_state,
    is_inside,
    split_variables,
)
from polyak_model.weight_files.writer import create_groups, created_weights


@dataclasses.dataclass
class Rebuilt:
    """The result of `rebuild`.

    Attributes:
        rule: The rule of the rebuilt average.
        step: The step at which it ends, an int.
        coefficients: A dict from `(step, name)` of each average that has a part
            to its coefficient. They sum to 1.
        profile_error: The error of the shares of the iterates, relative to the
            L2 norm of the shares: that of the average if iterates are white noise.
        walk_error: The expected error of the average, relative to its distance
            from the raw weights, if iterates walk at random.
        rounding: The sum of the absolute coefficients.
        statistics: The names of the BatchNormalization layers, whose statistics
            should be refreshed; empty without an output.
        notes: Sentences about snapshots that do not count, and about exactness.
    """

    rule: Rule
    step: int
    coefficients: dict
    profile_error: float
    walk_error: float
    rounding: float
    statistics: list
    notes: list

    @property
    def snapshots(self):
        """The number of snapshots that have a part."""
        return len({step for step, _ in self.coefficients})


def rebuild(
    folder: str | os.PathLike,
    rule: Rule,
    output: str | os.PathLike | None = None,
    like: str | os.PathLike | None = None,
    step: int | None = None,
    max_error: float = 0.05,
    progress: Callable[[float], None] | None = None,
) -> Rebuilt:
    """Writes the average that a rule would have given, from snapshots of other averages.

    It is the linear combination of the stored averages whose shares of the
    iterates are closest to those of the rule, with coefficients that sum to 1.
    It is computed in float64, slab by slab, and rounded once.
    Weights that are not averaged, such as BatchNormalization statistics and
    integers, are those of the last snapshot that has a part.

    Args:
        folder: The folder of an `AverageSnapshots` callback.
        rule: A `polyak_model.Rule`, the average to rebuild.
        output: Where to write: a `.weights.h5` file or, with `like`, a `.keras`
            file. Defaults to None: only the coefficients and errors are computed.
        like: A plain `.keras` file of the architecture, which gives the config
            and the dtypes. Defaults to None.
        step: The step at which the average ends, an int up to that of the last
            snapshot. Defaults to None: that of the last snapshot.
        max_error: Float. The largest walk error. Defaults to 0.05.
        progress: A function of the fraction done, a float up to 1, called now
            and then. Defaults to None.

    Returns:
        A `Rebuilt`.

    Raises:
        InputError: If the snapshots cannot be used, `walk_error` would exceed
            `max_error`, or the output cannot be written; what was at `output` is
            unchanged then.
        ValueError: If an argument is out of its range.

    Example:

    >>> import pathlib, tempfile
    >>> import h5py
    >>> import numpy as np
    >>> from polyak_model import PowerAverage
    >>> from polyak_model.rules import shares
    >>> from polyak_model.snapshots.folder import snapshot_name
    >>> from polyak_model.snapshots.record import Record, Weight, write_snapshot
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> iterates, rules = np.sqrt(np.arange(1, 1001)), PowerAverage.pair()
    >>> for n in range(125, 1001, 125):
    ...     averages = {name: shares(rule, n) @ iterates[:n] for name, rule in rules.items()}
    ...     weights = {
    ...         name: [Weight("layers/dense/vars/0", np.array(average), "float32", True)]
    ...         for name, average in averages.items()
    ...     }
    ...     record = Record("run", n, n, 0, n, rules)
    ...     write_snapshot(folder / snapshot_name(n), record, weights)
    >>> target = PowerAverage.from_relative_width(0.10)
    >>> rebuilt = rebuild(folder, target, folder / "rebuilt.weights.h5")
    >>> rebuilt.step, rebuilt.snapshots, round(rebuilt.walk_error, 4)
    (1000, 8, 0.0133)
    >>> with h5py.File(folder / "rebuilt.weights.h5") as file:
    ...     round(float(file["layers/dense/vars/0"][()]), 3)
    29.752
    >>> round(float(shares(target, 1000) @ iterates), 3)
    29.757
    """
    if not isinstance(rule, Rule):
        raise ValueError(
            "`rule` must be a rule such as PowerAverage.from_relative_width(0.1). "
            f"Received: rule={rule!r}."
        )
    if not is_number(max_error) or not max_error >= 0:
        raise ValueError(
            f"`max_error` must be a number of at least 0. Received: max_error={max_error!r}. "
            "Use 0.05, an error of 5 % of the distance from the raw weights."
        )
    check_paths(output, like)
    run = read_run(folder)
    rebuilt = find_combination(run, fit(run, step), rule)
    if rebuilt.walk_error > max_error:
        raise _too_far(run, rebuilt, max_error)
    if output is not None:
        rebuilt.statistics = write(run, rebuilt.coefficients, output, like, progress)
    return rebuilt


def fit(run, step=None):
    """Returns the `Basis` of the snapshots up to a step.

    Args:
        run: A `Run`.
        step: Int. Defaults to None: that of the last snapshot.

    Raises:
        InputError: If the step is before the first snapshot or after the last.
    """
    step = run.step if step is None else check_integer("step", step, at_least=1)
    first = run.snapshots[0].record.step
    if not first <= step <= run.step:
        raise InputError(
            f"`step` must be from {first}, the step of the first snapshot, to {run.step}, that of "
            f"the last. Received: {step}. Choose one between."
        )
    return Basis(run.stored(), step)


def find_combination(run, basis, rule):
    """Returns the `Rebuilt` of a rule, of which nothing is written yet.

    Args:
        run: A `Run`.
        basis: Its `Basis`.
        rule: A `polyak_model.rules.Rule`.
    """
    notes = list(run.notes)
    if len(run.rules) == 1:
        notes.append(
            "The snapshots are of a single average. Two, as of PowerAverage.pair(), are more exact."
        )
    return Rebuilt(rule, basis.step, *basis.combine(rule), statistics=[], notes=notes)


def write(run, coefficients, output, like=None, progress=None):
    """Writes a linear combination of the averages in snapshots.

    It is `write_several` with one combination and one output.
    """
    return write_several(run, [coefficients], [output], like, progress)


def write_several(run, combinations, outputs, like=None, progress=None, is_durable=True):
    """Writes linear combinations of the averages in snapshots, in one pass over them.

    Args:
        run: A `Run`.
        combinations: List of dicts from `(step, name)` to a float.
        outputs: For each the path of a `.weights.h5` file; or, with `like`, of a
            `.keras` file.
        like: Path of a `.keras` file of the architecture, or None.
        progress: A function of the fraction done, or None.
        is_durable: Bool. Whether to wait until the disk has the outputs. Defaults
            to True.

    Returns:
        The names of the BatchNormalization layers, a list.

    Raises:
        InputError: If the files cannot be used or an output cannot be written;
            what was there is unchanged then.
    """
    keys = sorted({key for each in combinations for key in each})
    steps = {step for step, _ in keys}
    records = {each.record.step: each.record for each in run.snapshots}
    with contextlib.ExitStack() as stack:
        chosen = [each for each in run.snapshots if each.record.step in steps]
        opened = stack.enter_context(opened_snapshots(chosen))
        files = {(step, name): _view(opened[step], name, records[step]) for step, name in keys}
        check_alike(list(files.values()))
        # The last one gives what is not averaged. Of several of one step, the largest part does.
        lasts = [max(each, key=lambda key: (key[0], abs(each[key]))) for each in combinations]
        step, name = lasts[0]
        newest = files[lasts[0]]
        variables = dict(newest.variables)
        with_lora = take_lora(variables)
        kernels = {path: lora.kernel for path, lora in with_lora.items()}
        dtypes = _dtypes(records[step].dtypes[name], newest)
        averaged = [path for path in records[step].averaged[name] if path in variables]
        pattern = newest
        if like is not None:
            pattern = stack.enter_context(open_weights(like))
            check_plain([pattern])
            dtypes = _check_architecture(pattern, variables | kernels)
        floats = [path for path, variable in variables.items() if "float" in variable.dtype]
        mirrored = [path for path in floats if path not in set(averaged)]
        others = [path for path in variables if path not in set(floats)]
        size = sum(variable.nbytes for variable in newest.variables.values())
        targets = []
        for last, output in zip(lasts, outputs, strict=True):
            partial = stack.enter_context(writing(output, size, is_durable))
            target = stack.enter_context(created_weights(partial, pattern))
            _create_model_groups(target, pattern)
            copy(files[last], {path: path for path in others}, target)
            combine([files[last]], [1.0], mirrored, target, dtypes=dtypes)
            targets.append(target)
        weights = [[each.get(key, 0.0) for key in keys] for each in combinations]
        combine_several(list(files.values()), weights, averaged, targets, progress, dtypes)
        for path, lora in with_lora.items():
            for target, own in zip(targets, weights, strict=True):
                first, second = (
                    _Combined(list(files.values()), own, factor.name)
                    for factor in (lora.first, lora.second)
                )
                lora._replace(first=first, second=second).write(path, target, dtypes[path])
        return find_batch_statistics(dataclasses.replace(pattern, variables=newest.variables))


class _Combined(typing.NamedTuple):
    """A linear combination of a small variable of several files."""

    files: list
    coefficients: list
    name: str

    def read(self):
        """Returns its values, an array."""
        pairs = zip(self.coefficients, self.files, strict=True)
        return sum(c * file.variables[self.name].read().astype("float64") for c, file in pairs)


def check_paths(output, like):
    """Checks the endings of the output and the architecture, and that the output can be created.

    Args:
        output: The file to write, or None.
        like: A `.keras` file, or None.

    Raises:
        InputError: If an ending is wrong or the output cannot be created.
    """
    if like is not None and find_kind(like) != ".keras":
        raise InputError(
            f"`like` must be a .keras file of the architecture. Received: {str(like)!r}. Save the "
            "model under such a name: model.average_model.save('model.keras')."
        )
    if output is None:
        return
    check_output(output, (".weights.h5", ".keras"), [] if like is None else [like])
    if str(output).endswith(".keras") and like is None:
        raise InputError(
            f"Cannot write {str(output)!r}: snapshots contain no architecture. Name a plain .keras "
            "file of it (`like`), or choose a name in .weights.h5."
        )


def _view(weights, name, record):
    """Returns one average in a snapshot as a `WeightFile` of its own."""
    prefix = f"{AVERAGES}/{name}/"
    variables = {}
    for path, variable in weights.variables.items():
        if path.startswith(prefix):
            variable = shallow.copy(variable)
            variable.name = path.removeprefix(prefix)
            variables[variable.name] = variable
    groups = {
        path.removeprefix(prefix): attributes
        for path, attributes in weights.attributes.items()
        if path.startswith(prefix)
    }
    return dataclasses.replace(
        weights, variables=variables, attributes={"": {}, **groups, **record.groups}, places=()
    )


def _dtypes(recorded, last):
    """Returns the dtypes of the float variables in the model."""
    dtypes = {}
    for path, variable in last.variables.items():
        dtype = recorded.get(path)
        if "float" in variable.dtype:
            if dtype not in ("float16", "bfloat16", "float32", "float64"):
                raise refusal(last.path, f"its record has no dtype of {path!r}", "Leave it out")
            dtypes[path] = dtype
    return dtypes


def _check_architecture(like, variables):
    """Returns the dtypes of the weights of a model, whose paths and shapes must be the same."""
    model, _ = split_variables(like)
    difference = next(iter(sorted(model.keys() ^ variables.keys())), None)
    if difference is not None:
        where = "only there" if difference in model else "only in the snapshots"
        raise _architecture_error(like, f"{difference!r} is {where}")
    for path, variable in model.items():
        if variable.shape != variables[path].shape:
            shapes = f"{variable.shape} there and {variables[path].shape} in the snapshots"
            raise _architecture_error(like, f"{path!r} has the shapes {shapes}")
    return {path: variable.dtype for path, variable in model.items() if "float" in variable.dtype}


def _architecture_error(like, problem):
    return refusal(
        like.path,
        f"it is of another architecture than the snapshots: {problem}",
        "Name the .keras file of a plain model of the same architecture",
    )


def _create_model_groups(target, pattern):
    state = set.union(*find_training_state(pattern))
    groups = pattern.attributes.items()
    create_groups(target, {name: a for name, a in groups if not is_inside(name, state)})


def _too_far(run, rebuilt, max_error):
    basis = fit(run, rebuilt.step)
    nearest = find_nearest(basis, rebuilt.rule, max_error)
    count = find_count(basis, rebuilt.rule, max_error)
    remedy = f"The nearest that can be rebuilt has {nearest}. " if nearest else ""
    last = max(step for step, _ in rebuilt.coefficients)
    if last < rebuilt.step:
        remedy += f"The last snapshot before is of step {last}: choose that step. "
    if count is None:
        remedy += "More snapshots of these averages would not suffice: keep a more similar average"
    else:
        remedy += f"It would take about {count} snapshots, or a more similar average"
    return InputError(
        f"Cannot rebuild {rebuilt.rule} at step {rebuilt.step}: the expected error is "
        f"{100 * rebuilt.walk_error:.3g} % of its distance from the raw weights, more than "
        f"{100 * max_error:.3g} %, with {rebuilt.snapshots} snapshots of {_list(run.rules)}. "
        f"{remedy}."
    )


def _list(rules):
    return " and ".join(f"{name}={rule}" for name, rule in rules.items())
