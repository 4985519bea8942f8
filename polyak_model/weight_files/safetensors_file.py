"""Reads and writes safetensors files of any framework: named tensors without a model.

A file consists of the length of a header, the header in JSON and the bytes of
the tensors without gaps. The `safetensors` package checks all of this.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import struct

import numpy as np

from polyak_model.weight_files.hdf5 import GuardedFile
from polyak_model.weight_files.refusal import opened, refusal, refusing
from polyak_model.weight_files.tensor import Variable

ENDING = ".safetensors"
_DAMAGED = "it is a damaged safetensors file"
_REMEDY = "Write it again with safetensors"
_LONGEST_HEADER = 16 * 2**20
_LENGTH = struct.Struct("<Q")
_BLOCK = 2**20
_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the numbers of a tensor are, for `Variable`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def get_offset(self):
        return self.offset


@contextlib.contextmanager
def open_tensors(path):
    """Opens a safetensors file, and checks everything but the numbers.

    Args:
        path: Its path.

    Yields:
        A dict from name to `Variable`, and the metadata, a dict of strings.

    Raises:
        InputError: If the file or the package `safetensors` is missing, or the
            file is damaged or has tensors of a dtype that is not supported.
    """
    with opened(path) as file:
        safe_open = _import(path)
        guarded = GuardedFile(file)
        with refusing(path, _DAMAGED):
            (length,) = _LENGTH.unpack(guarded.read(_LENGTH.size))
            if length > _LONGEST_HEADER:
                raise refusal(path, f"its header is longer than {_LONGEST_HEADER:,} bytes", _REMEDY)
            with safe_open(os.fspath(path), framework="np") as tensors:
                variables = dict(_list(tensors, guarded, _LENGTH.size + length, path))
                metadata = tensors.metadata() or {}
        yield variables, metadata


def _import(path):
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise refusal(
            path,
            f"reading it needs the package 'safetensors', which cannot be imported ({error})",
            "Install it: pip install safetensors",
        ) from error
    return safe_open


def _list(tensors, file, start, path):
    # Tensors follow each other without gaps, as the package has checked.
    for name in tensors.offset_keys():
        tensor = tensors.get_slice(name)
        shape, code = tuple(tensor.get_shape()), tensor.get_dtype()
        if code not in _DTYPES:
            raise refusal(
                path,
                f"{name!r} has dtype {code}, which is not supported",
                f"Convert it to one of {', '.join(_DTYPES)}",
            )
        dtype = _DTYPES[code]
        stored = np.dtype("V2" if dtype == "bfloat16" else dtype).newbyteorder("<")
        variable = Variable(name, dtype, _Place(shape, stored, start), file, path)
        yield name, variable
        start += variable.nbytes


class TensorsWriter:
    """Collects tensors for a safetensors file, see `created_tensors`."""

    def __init__(self, file):
        self._file = file
        self.header = {}

    def create(self, name, shape, dtype):
        """Adds a tensor after those before, to be filled part by part and in order.

        Args:
            name: Its name.
            shape: A tuple of ints.
            dtype: Its dtype as Keras names it.

        Returns:
            A function of (index, array) that appends an array of that dtype.
        """
        begin = self._file.tell()
        size = math.prod(shape) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
        offsets = [begin, begin + size]
        self.header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": offsets}

        def write(index, array):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            self._file.write(np.ascontiguousarray(little).tobytes())

        return write


@contextlib.contextmanager
def created_tensors(path, metadata):
    """Creates a safetensors file.

    Args:
        path: A `pathlib.Path`, in a folder that may contain other files for a
            while.
        metadata: A dict of strings.

    Yields:
        A `TensorsWriter`.

    Raises:
        OSError: If the file cannot be written.
    """
    # The header comes first, and is known last.
    data = path.with_name("data")
    with open(data, "wb") as file:
        writer = TensorsWriter(file)
        yield writer
    header = {"__metadata__": metadata, **writer.header} if metadata else writer.header
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, open(data, "rb") as source:
        file.write(_LENGTH.pack(len(text)) + text)
        shutil.copyfileobj(source, file, _BLOCK)
    data.unlink()
