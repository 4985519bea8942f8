"""A tensor in a weight file, read as a whole or part by part."""

import dataclasses
import math

import h5py
import ml_dtypes
import numpy as np

from polyak_model.weight_files.refusal import refusing


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a tensor that is contiguous in row-major order.

    Attributes:
        index: Index of the part in the tensor, a tuple of ints and slices.
        shape: Its shape, a tuple of ints.
        start: The number of elements of the tensor before it.
    """

    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    start: int


def cut(shape, size):
    """Cuts a tensor into parts.

    Args:
        shape: Its shape, a tuple of ints.
        size: The maximum number of elements of a part.

    Yields:
        `Part`s, in order.

    Example:

    >>> for part in cut((3, 2), 4):
    ...     print(part.index, part.shape, part.start)
    (slice(0, 2, None),) (2, 2) 0
    (slice(2, 3, None),) (1, 2) 4
    """
    row = math.prod(shape[1:])
    if math.prod(shape) <= size:
        yield Part((), shape, 0)
    elif row <= size:
        rows = size // row
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            yield Part((slice(start, stop),), (stop - start, *shape[1:]), start * row)
    else:
        for i in range(shape[0]):
            for part in cut(shape[1:], size):
                yield Part((i, *part.index), part.shape, i * row + part.start)


class Variable:
    """One tensor of a file; its numbers stay on disk until `read`.

    Args:
        name: Its path in the file, such as `layers/dense/vars/0`.
        dtype: Its dtype as Keras names it.
        dataset: An `h5py.h5d.DatasetID`, checked by `hdf5.list_variables`.
        file: The `GuardedFile` with the numbers.
        source: The path of the file, for errors.
    """

    def __init__(self, name, dtype, dataset, file, source):
        self.name = name
        self.dtype = dtype
        self.shape = dataset.shape
        self.source = source
        self._stored = dataset.dtype
        self._file = file
        # HDF5 knows the offset only of contiguous tensors, which Keras writes.
        self._offset = dataset.get_offset() if self.nbytes else 0
        self._dataset = dataset if self._offset is None else None

    @property
    def nbytes(self):
        """The size of its array in bytes."""
        return math.prod(self.shape) * self._stored.itemsize

    @property
    def needs_hdf5(self):
        """Whether HDF5 must read it, which takes megabytes of memory for each open file."""
        return self._dataset is not None

    def read(self, part=None):
        """Reads the array, or a part of it.

        Args:
            part: A `Part`. Defaults to None: everything.

        Returns:
            A NumPy array of dtype `dtype`; for bfloat16 that of ml_dtypes.

        Raises:
            InputError: If the file is damaged there.
        """
        part = Part((), self.shape, 0) if part is None else part
        with refusing(self.source, f"{self.name!r} cannot be read"):
            if self.needs_hdf5:
                array = np.asarray(h5py.Dataset(self._dataset)[part.index])
            else:
                array = np.empty(part.shape, self._stored)
                position = self._offset + part.start * self._stored.itemsize
                self._file.read_at(position, array.reshape(-1).view("uint8").data)
        return array.view(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else array
