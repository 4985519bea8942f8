"""Averages of weight files: tensor by tensor, in float64, without Keras."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import threading

import numpy as np

from polyak_model.errors import InputError, is_number
from polyak_model.saving.wrapper_reader import check_plain
from polyak_model.weight_files.atomic_write import written_whole
from polyak_model.weight_files.batch_norm_layers import find_batch_statistics
from polyak_model.weight_files.compatibility import (
    check_alike,
    check_kinds,
    check_places,
    is_optimizer_state,
)
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.tensor import cut
from polyak_model.weight_files.writer import create_groups, create_variable, created_weights

# Larger ones take more memory, and smaller ones more time for Python than for the sums.
_SLAB = 2**18
# One reads while the other adds.
_THREADS = 2


@dataclasses.dataclass
class AveragedFiles:
    """What `average_files` did.

    Attributes:
        shares: What each file counts, floats that sum to 1.
        averaged: The names of the averaged variables.
        copied: The names of the variables that the last file gave: integers,
            booleans and seeds.
        statistics: The names of the BatchNormalization layers, whose statistics
            should be refreshed.
    """

    shares: list
    averaged: list
    copied: list
    statistics: list


def average_files(paths, output, weights=None, progress=None):
    """Averages weight files of Keras, and writes one that Keras loads.

    Each float variable becomes the weighted sum over the files, computed in
    float64 and rounded once to the variable's dtype. Integers, booleans and
    seeds are the last file's; the optimizer's state is left out. A few slabs of
    one tensor are in memory at a time, however many files there are.

    Args:
        paths: Files that end in `.weights.h5`, `.keras` or `.weights.json`, at
            least two, of the same model.
        output: Where to write: a `.weights.h5` file, or, if all `paths` are
            such, a `.keras` file, which takes everything but the weights from
            the last file and is loaded without being compiled.
        weights: What each file counts, relative to the others: numbers of at
            least 0, such as `polyak_model.closed_forms` gives. Defaults to
            None: all the same.
        progress: A function of the share done, a float up to 1, called now and
            then. Defaults to None.

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
        result = _describe(files[-1], shares)
        with _written(output) as partial, created_weights(partial, like=files[-1]) as target:
            groups = files[-1].attributes.items()
            create_groups(target, {n: a for n, a in groups if not is_optimizer_state(n)})
            _fill(target, files, result, progress or (lambda share: None))
        return result


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


def _describe(file, shares):
    names = [name for name in file.variables if not is_optimizer_state(name)]
    averaged = [name for name in names if "float" in file.variables[name].dtype]
    copied = [name for name in names if name not in set(averaged)]
    return AveragedFiles(shares, averaged, copied, find_batch_statistics(file))


@contextlib.contextmanager
def _written(output):
    try:
        with written_whole(output) as partial:
            yield partial
    except OSError as error:
        raise InputError(str(error.strerror or error)) from error


def _fill(target, files, result, progress):
    last = files[-1].variables
    for name in result.copied:
        write = create_variable(target, last[name])
        for part in cut(last[name].shape, _SLAB):
            write(part.index, last[name].read(part))
    total = max(1, sum(last[name].nbytes for name in result.averaged))
    done = 0
    slabs = _Slabs()
    jobs = (
        (slabs, [file.variables[name] for file in files], result.shares, part)
        for name in result.averaged
        for part in cut(last[name].shape, _SLAB)
    )
    written = None
    for (_, sources, _, part), average in _in_order(_average, jobs):
        if sources[-1] is not written:
            written = sources[-1]
            write = create_variable(target, written)
        write(part.index, average)
        done += average.nbytes
        progress(done / total)


class _Slabs(threading.local):
    """What a thread computes in, part after part: new memory would cost more than the sums."""

    def __init__(self):
        self._total, self._term = np.empty(_SLAB), np.empty(_SLAB)

    def of_shape(self, shape):
        """Returns two float64 arrays of a shape."""
        size = math.prod(shape)
        return self._total[:size].reshape(shape), self._term[:size].reshape(shape)


def _in_order(function, jobs):
    """Yields each job with what a function makes of it, in threads, a few jobs ahead."""
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        for job in jobs:
            waiting.append((job, threads.submit(function, *job)))
            if len(waiting) > _THREADS:
                job, future = waiting.popleft()
                yield job, future.result()
        for job, future in waiting:
            yield job, future.result()


# What is infinite is found at the end, and what only became so is brought back by the bounds.
@np.errstate(over="ignore", invalid="ignore")
def _average(slabs, sources, shares, part):
    """Returns the average of a part of a tensor, in its dtype."""
    array = sources[0].read(part)
    total, term = slabs.of_shape(part.shape)
    np.multiply(array, shares[0], out=total, dtype="float64")
    # A float64 may exceed what it is the mean of by a rounding; others are rounded afterwards.
    bounds = (array, array) if array.dtype == np.float64 else None
    for source, share in zip(sources[1:], shares[1:], strict=True):
        array = source.read(part)
        # Converting, multiplying and adding one after the other is faster than two at a time.
        np.copyto(term, array)
        np.multiply(term, share, out=term)
        np.add(total, term, out=total)
        if bounds:
            bounds = np.minimum(bounds[0], array), np.maximum(bounds[1], array)
    if bounds:
        np.clip(total, *bounds, out=total)
    if not np.isfinite(total).all():
        raise _infinite(sources, part)
    return total.astype(array.dtype)


def _infinite(sources, part):
    source = next(source for source in sources if not np.isfinite(source.read(part)).all())
    return refusal(
        source.source,
        f"{source.name!r} holds numbers that are infinite or none",
        "Leave it out, or take an earlier file",
    )
