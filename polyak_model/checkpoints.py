"""Averages of weight files, without Keras."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence

from polyak_model.errors import InputError, is_number
from polyak_model.saving.wrapper_reader import check_plain
from polyak_model.weight_files.batch_norm_layers import find_batch_statistics
from polyak_model.weight_files.combine import combine, copy
from polyak_model.weight_files.compatibility import check_alike, check_kinds, check_places
from polyak_model.weight_files.output import writing
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.training_state import (
    find_training_state,
    is_inside,
    split_variables,
)
from polyak_model.weight_files.writer import create_groups, created_weights


@dataclasses.dataclass
class AveragedFiles:
    """The result of `average_files`.

    Attributes:
        shares: The share of each file in the average, floats that sum to 1.
        averaged: The names of the averaged variables.
        copied: The names of the variables copied from the last file: integers,
            booleans and seeds.
        statistics: The names of the BatchNormalization layers, whose statistics
            should be refreshed.
    """

    shares: list[float]
    averaged: list[str]
    copied: list[str]
    statistics: list[str]


def average_files(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    weights: Iterable[float] | None = None,
    progress: Callable[[float], None] | None = None,
) -> AveragedFiles:
    """Averages weight files of Keras, and writes one that Keras loads; or safetensors files.

    Each float variable becomes the weighted mean over the files, computed in
    float64 and rounded once to the dtype of the variable. Integers, booleans and
    seeds are those of the last file; the states of optimizers and metrics are
    left out.

    Args:
        paths: Files that end in `.weights.h5`, `.keras` or `.weights.json`, at
            least two, of the same model; or `.safetensors` files of any
            framework, with the package `safetensors`.
        output: Where to write: a `.weights.h5` file; or, if all `paths` are
            `.keras` files, a `.keras` file, which is loaded without being
            compiled and has everything but the weights from the last file; or a
            `.safetensors` file, with tensors named by their paths.
        weights: The weight of each file relative to the others, numbers of at
            least 0, for instance from `polyak_model.rules.shares`. Defaults to
            None: equal weights.
        progress: A function of the fraction done, a float up to 1, called now
            and then. Defaults to None.

    Returns:
        An `AveragedFiles`.

    Raises:
        InputError: If the files cannot be averaged or the output cannot be
            written; what was at `output` is unchanged then.

    Example:

    >>> import h5py, pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> names = [str(folder / f"{n}.weights.h5") for n in range(2)]
    >>> for n, name in enumerate(names):
    ...     with h5py.File(name, "w") as file:
    ...         file["layers/dense/vars/0"] = [1.0 * n, 4.0]
    >>> average_files(names, folder / "average.weights.h5", weights=[1, 3]).shares
    [0.25, 0.75]
    >>> with h5py.File(folder / "average.weights.h5") as file:
    ...     file["layers/dense/vars/0"][()]
    array([0.75, 4.  ])
    """
    shares = _normalize(weights, len(paths))
    check_kinds(paths, output)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in paths]
        check_plain(files)
        check_places(files, output)
        check_alike(files)
        last = files[-1]
        variables, _ = split_variables(last)
        averaged = [name for name, variable in variables.items() if "float" in variable.dtype]
        copied = [name for name in variables if name not in set(averaged)]
        size = sum(variable.nbytes for variable in variables.values())
        with writing(output, size) as partial, created_weights(partial, like=last) as target:
            state = set.union(*find_training_state(last))
            groups = last.attributes.items()
            create_groups(target, {name: a for name, a in groups if not is_inside(name, state)})
            copy(last, {name: name for name in copied}, target)
            combine(files, shares, averaged, target, progress)
        return AveragedFiles(shares, averaged, copied, find_batch_statistics(last))


def _normalize(weights, count):
    if count < 2:
        raise InputError(f"An average needs at least two files. Received: {count}. Name more.")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise InputError(
            f"There must be one weight for each file. Received: {len(weights)} weights for "
            f"{count} files. Name as many of both."
        )
    for weight in weights:
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise InputError(
                f"Weights must be finite numbers of at least 0. Received: {weight!r}. "
                "They are relative to each other."
            )
    if not any(weights):
        raise InputError("One of the weights must be above 0. Received: only 0. Use e.g. 1 2 3.")
    # Dividing first keeps the sum finite.
    largest = max(weights)
    relative = [weight / largest for weight in weights]
    return [weight / math.fsum(relative) for weight in relative]
