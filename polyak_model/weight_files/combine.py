"""Linear combinations of weight files: tensor by tensor in float64, without Keras."""

import collections
import concurrent.futures
import math
import threading

import ml_dtypes
import numpy as np

from polyak_model.weight_files.refusal import refusal
from polyak_model.weight_files.tensor import cut
from polyak_model.weight_files.writer import create_variable

# In elements. Larger slabs take more memory, and leave the cache; smaller ones take more time in
# Python.
_SLAB, _SLAB_OF_SEVERAL = 2**18, 2**15
# Several combinations are products of matrices, for so many files at a time.
_FILES = 16
# One reads while the other adds.
_THREADS = 2


def combine(files, coefficients, names, target, progress=None, dtypes=None):
    """Writes a linear combination of the variables of several files.

        result = coefficients[0] * files[0] + coefficients[1] * files[1] + ...

    It is `combine_several` with one combination.
    """
    combine_several(files, [coefficients], names, [target], progress, dtypes)


def combine_several(files, combinations, names, targets, progress=None, dtypes=None):
    """Writes linear combinations of the variables of several files, in one pass over them.

        result[i] = combinations[i][0] * files[0] + combinations[i][1] * files[1] + ...

    computed in float64 and rounded once to the dtype of the variable. A few slabs
    of one tensor are in memory at a time, however many files there are.

    Args:
        files: `WeightFile`s with the same variables.
        combinations: List of lists of floats of any sign, one for each file.
        names: Names of float variables.
        targets: For each combination an `h5py.File` open for writing, to create
            its variables in.
        progress: A function of the fraction done, a float up to 1, which is
            called now and then. Defaults to None.
        dtypes: Dict from names to dtypes to write, as Keras names them. Defaults
            to None: those of the last file.

    Raises:
        InputError: If a file is damaged or contains inf or NaN, or a result
            exceeds the range of its dtype.
    """
    last = files[-1].variables
    total = max(1, sum(math.prod(last[name].shape) for name in names))
    done = 0
    slab, height = (_SLAB, 1) if len(combinations) == 1 else (_SLAB_OF_SEVERAL, _FILES)
    combinations = np.array(combinations, "float64")
    buffers = _Buffers(len(combinations), height, slab)
    dtypes = {name: last[name].dtype for name in names} | (dtypes or {})
    jobs = (
        (buffers, [f.variables[name] for f in files], combinations, part, dtypes[name])
        for name in names
        for part in cut(last[name].shape, slab)
    )
    created = None
    for (_, variables, _, part, dtype), results in _map_in_order(_combine_part, jobs):
        if variables[-1] is not created:
            created = variables[-1]
            writes = [create_variable(t, created.name, created.shape, dtype) for t in targets]
        for write, result in zip(writes, results, strict=True):
            write(part.index, result)
        done += math.prod(part.shape)
        if progress is not None:
            progress(done / total)


def copy(file, names, target):
    """Copies variables of a file, slab by slab.

    Args:
        file: A `WeightFile`.
        names: A dict from the names of the variables to their new names.
        target: An `h5py.File` open for writing.

    Raises:
        InputError: If the file is damaged.
    """
    for name, new_name in names.items():
        variable = file.variables[name]
        write = create_variable(target, new_name, variable.shape, variable.dtype)
        for part in cut(variable.shape, _SLAB):
            write(part.index, variable.read(part))


class _Buffers(threading.local):
    """Float64 buffers per thread: allocating them for each slab costs more than the sums.

    Args:
        count: Int, the number of sums.
        height: Int, the number of files that are read at once.
        slab: Int, the maximum number of elements of a part.
    """

    def __init__(self, count, height, slab):
        values = np.empty((height, slab))
        # A single sum needs the values of a file no longer once they are multiplied.
        terms = values if height == 1 else np.empty((count, slab))
        self._arrays = np.empty((count, slab)), terms, values

    def of_size(self, size):
        """Returns float64 matrices with so many columns: the sums, their terms, the files."""
        return [array[:, :size] for array in self._arrays]


def _map_in_order(function, jobs):
    """Yields each job with the result of a function, computed in threads a few jobs ahead."""
    pending = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        for job in jobs:
            pending.append((job, threads.submit(function, *job)))
            if len(pending) > _THREADS:
                job, future = pending.popleft()
                yield job, future.result()
        for job, future in pending:
            yield job, future.result()


# The results are checked at the end.
@np.errstate(over="ignore", invalid="ignore")
def _combine_part(buffers, variables, combinations, part, dtype):
    """Returns each combination of one part of a tensor, in a dtype."""
    totals, terms, values = buffers.of_size(math.prod(part.shape))
    # A mean lies between its terms. Rounding in float64 may leave these bounds, or overflow.
    # Narrower dtypes are rounded only afterwards.
    are_means = [variables[0].dtype == "float64" and _is_mean(each) for each in combinations]
    low, high = np.inf, -np.inf
    multiply = np.multiply if len(values) == 1 else np.matmul
    for first in range(0, len(variables), len(values)):
        few = slice(first, first + len(values))
        rows = values[: len(variables[few])]
        for row, variable in zip(rows, variables[few], strict=True):
            np.copyto(row.reshape(part.shape), variable.read(part))
        if any(are_means):
            low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
        multiply(combinations[:, few], rows, out=terms if first else totals)
        if first:
            totals += terms
    results = []
    for total, is_mean in zip(totals, are_means, strict=True):
        if is_mean:
            np.clip(total, low, high, out=total)
        total = total.reshape(part.shape)
        results.append(total.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
        if not np.isfinite(results[-1]).all():
            raise _not_finite(variables, part, dtype)
    return results


def _is_mean(coefficients):
    return min(coefficients) >= 0 and math.isclose(math.fsum(coefficients), 1)


def _not_finite(variables, part, dtype):
    for variable in variables:
        if not np.isfinite(variable.read(part)).all():
            return refusal(
                variable.source,
                f"{variable.name!r} contains inf or NaN",
                "Leave it out, or take an earlier file",
            )
    last = variables[-1]
    return refusal(
        last.source,
        f"the combination of {last.name!r} exceeds the range of {dtype}",
        "Use smaller coefficients",
    )
