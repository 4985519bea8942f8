"""The variables of one HDF5 file that somebody else wrote, listed and read with distrust.

HDF5 can point outside the file, declare tensors that it does not hold and nest
without end. Keras's weight files do none of that, so whatever does is refused.
"""

import math

import h5py
import ml_dtypes
import numpy as np

from polyak_model.arguments import InputError

# What HDF5 itself and NumPy raise on damaged files.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_NUMBERS = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_DEEPEST = 100
# Deflate cannot shrink more than 1032 to 1.
_MOST_EXPANSION = 1100
_SMALL = 64 * 2**20
# Deflate, shuffle, Fletcher's checksum and LZF: they are built in, others are loaded as plugins.
_FILTERS = {1, 2, 3, 32000}
_LONGEST_ATTRIBUTE = 2**16


class Variable:
    """One tensor of a file; it is read only when asked for.

    Args:
        name: Its path in the file, such as `layers/dense/vars/0`.
        dataset: An `h5py.Dataset` that `list_variables` has checked.
        source: The path of the file, for errors.
    """

    def __init__(self, name, dataset, source):
        self.name = name
        self.source = source
        self.shape = dataset.shape
        self.dtype = _keras_dtype(dataset)
        self._dataset = dataset

    @property
    def nbytes(self):
        """How many bytes its array takes."""
        return math.prod(self.shape) * self._dataset.dtype.itemsize

    def read(self, part=()):
        """Reads the array, or a part of it.

        Args:
            part: A tuple of slices or ints, one for each of the first axes.
                Defaults to (): everything.

        Returns:
            A NumPy array of the dtype `dtype`, in ml_dtypes' for bfloat16.

        Raises:
            InputError: If the file is damaged there.
        """
        try:
            array = np.asarray(self._dataset[part])
        except DAMAGE as error:
            problem = f"{self.name!r} cannot be read ({in_one_line(error)})"
            raise refusal(self.source, problem) from error
        return array.view(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else array


def list_variables(file, source, size):
    """Finds every tensor of an HDF5 file, and reads none.

    Args:
        file: An open `h5py.File`.
        source: The path of the file, for errors.
        size: How many bytes it has.

    Returns:
        A dict from name to `Variable`, and a dict from the name of each group
        to its attributes; that of the outermost is "".

    Raises:
        InputError: If the file is damaged or holds what no weight file does.
    """
    variables, attributes = {}, {}
    try:
        # The checks of `GuardedFile` take lengths of eight bytes for granted.
        if file.id.get_create_plist().get_sizes() != (8, 8):
            raise refusal(source, "its addresses have a width that Keras does not write")
        for name, item in _walk(file, source):
            if isinstance(item, h5py.Group):
                attributes[name] = _read_attributes(item, name, source)
            else:
                _check_dataset(item, name, source, size)
                variables[name] = Variable(name, item, source)
    except InputError:
        raise
    except DAMAGE as error:
        raise refusal(source, f"it is damaged ({in_one_line(error)})") from error
    return variables, attributes


def refusal(source, problem, remedy="Save the weights again with Keras"):
    """Returns the `InputError` that says why a file is not used."""
    return InputError(f"Cannot use {str(source)!r}: {problem}. {remedy}.")


def in_one_line(error):
    """Returns the message of an exception as one line of bounded length."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def _walk(file, source):
    yield "", file
    seen = {h5py.h5o.get_info(file.id).addr}
    waiting = [("", file)]
    while waiting:
        prefix, group = waiting.pop()
        inside = []
        for key in group:
            name = f"{prefix}/{key}" if prefix else key
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise refusal(source, f"{name!r} is a link, which could point anywhere")
            item = group[key]
            if not isinstance(item, h5py.Group | h5py.Dataset):
                raise refusal(source, f"{name!r} is neither a group nor a tensor")
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                raise refusal(source, f"{name!r} also has another name, as in an endless loop")
            seen.add(address)
            if name.count("/") >= _DEEPEST:
                raise refusal(source, f"it has groups nested more than {_DEEPEST} deep")
            yield name, item
            if isinstance(item, h5py.Group):
                inside.append((name, item))
        waiting.extend(reversed(inside))


def _check_dataset(dataset, name, source, size):
    if dataset.is_virtual or dataset.external:
        raise refusal(source, f"{name!r} takes its numbers from another file")
    dtype = _keras_dtype(dataset)
    if dtype is None or dataset.shape is None:
        raise refusal(source, f"{name!r} holds {dataset.dtype}, no weights")
    if dataset.id.get_type().get_size() != dataset.dtype.itemsize:
        raise refusal(source, f"{name!r} holds numbers of a format that Keras does not write")
    declared = math.prod(dataset.shape) * dataset.dtype.itemsize
    if not _holds(dataset, declared, size):
        raise refusal(
            source,
            f"{name!r} declares {declared:,} bytes, shape {dataset.shape}, "
            "that the file does not hold",
        )


def _holds(dataset, declared, size):
    stored = dataset.id.get_storage_size()
    creation = dataset.id.get_create_plist()
    filters = {creation.get_filter(i)[0] for i in range(creation.get_nfilters())}
    if not 0 <= stored <= size or filters - _FILTERS:
        return False
    if dataset.chunks is not None:
        chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
        if chunk > max(_SMALL, declared):
            return False
    if filters:
        return declared <= max(_SMALL, _MOST_EXPANSION * stored)
    offset = dataset.id.get_offset() or 0
    return declared <= stored and offset + declared <= size


def _keras_dtype(dataset):
    dtype = dataset.dtype
    if dtype == np.dtype("V2") and _is_marked_bfloat16(dataset):
        return "bfloat16"
    return dtype.name if dtype.name in _NUMBERS else None


def _is_marked_bfloat16(dataset):
    # Keras writes bfloat16, which HDF5 does not know, as two opaque bytes.
    return _attribute(dataset, "dtype") == "bfloat16" if "dtype" in dataset.attrs else False


def _read_attributes(group, name, source):
    attributes = {}
    for key in group.attrs:
        attributes[key] = _attribute(group, key)
        if attributes[key] is None:
            raise refusal(source, f"the attribute {key!r} of {name!r} is no text and no number")
    return attributes


def _attribute(item, key):
    """Reads an attribute, or returns None if it is long or something other than text or numbers."""
    identifier = item.attrs.get_id(key)
    # A damaged file may declare billions of texts in a few bytes.
    length = max(identifier.get_storage_size(), 8 * math.prod(identifier.shape or ()))
    if length > _LONGEST_ATTRIBUTE:
        return None
    dtype = identifier.dtype
    if dtype.kind not in "biufSU" and h5py.check_string_dtype(dtype) is None:
        return None
    return item.attrs[key]
