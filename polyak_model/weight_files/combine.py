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

# In elements. Larger slabs take more memory, smaller ones more time in Python.
_SLAB = 2**18
# One reads while the other adds.
_THREADS = 2


def combine(files, coefficients, names, target, progress=None, dtypes=None):
    """Writes linear combinations of the variables of several files.

        result = coefficients[0] * files[0] + coefficients[1] * files[1] + ...

    computed in float64 and rounded once to the dtype of the variable. A few slabs
    of one tensor are in memory at a time, however many files there are.

    Args:
        files: `WeightFile`s with the same variables.
        coefficients: Floats, one for each file, of any sign.
        names: Names of float variables.
        target: An `h5py.File` open for writing, to create the variables in.
        progress: A function of the fraction done, a float up to 1, which is
            called now and then. Defaults to None.
        dtypes: Dict from names to dtypes to write, as Keras names them. Defaults
            to None: those of the last file.

    Raises:
        InputError: If a file is damaged or contains inf or NaN, or a result
            exceeds the range of its dtype.
    """
    last = files[-1].variables
    total = max(1, sum(last[name].nbytes for name in names))
    done = 0
    buffers = _Buffers()
    # A mean lies between its terms. Rounding in float64 may leave these bounds, or overflow.
    is_mean = min(coefficients) >= 0 and math.isclose(math.fsum(coefficients), 1)
    dtypes = {name: last[name].dtype for name in names} | (dtypes or {})
    jobs = (
        (buffers, [f.variables[name] for f in files], coefficients, part, dtypes[name], is_mean)
        for name in names
        for part in cut(last[name].shape, _SLAB)
    )
    created = None
    for (_, variables, _, part, dtype, _), result in _map_in_order(_combine_part, jobs):
        if variables[-1] is not created:
            created = variables[-1]
            write = create_variable(target, created.name, created.shape, dtype)
        write(part.index, result)
        done += result.nbytes
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
    """Two float64 buffers per thread: allocating them for each slab costs more than the sums."""

    def __init__(self):
        self._total, self._term = np.empty(_SLAB), np.empty(_SLAB)

    def of_shape(self, shape):
        """Returns two float64 arrays of a shape."""
        size = math.prod(shape)
        return self._total[:size].reshape(shape), self._term[:size].reshape(shape)


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


# The result is checked at the end.
@np.errstate(over="ignore", invalid="ignore")
def _combine_part(buffers, variables, coefficients, part, dtype, is_mean):
    """Returns the combination of one part of a tensor, in a dtype."""
    array = variables[0].read(part)
    total, term = buffers.of_shape(part.shape)
    np.multiply(array, coefficients[0], out=total, dtype="float64")
    # Narrower dtypes are rounded only afterwards.
    bounds = (array, array) if is_mean and array.dtype == np.float64 else None
    for variable, coefficient in zip(variables[1:], coefficients[1:], strict=True):
        array = variable.read(part)
        # Converting, multiplying and adding one after the other is faster than two at a time.
        np.copyto(term, array)
        np.multiply(term, coefficient, out=term)
        np.add(total, term, out=total)
        if bounds:
            bounds = np.minimum(bounds[0], array), np.maximum(bounds[1], array)
    if bounds:
        np.clip(total, *bounds, out=total)
    result = total.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if not np.isfinite(result).all():
        raise _not_finite(variables, part, dtype)
    return result


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
