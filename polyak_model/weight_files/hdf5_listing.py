"""What an HDF5 file that somebody else wrote holds, listed with distrust.

HDF5 can point outside the file, declare tensors that it does not hold and nest
without end. Keras's weight files do none of that, so whatever does is refused.
"""

import math

import h5py
import numpy as np

from polyak_model.errors import InputError
from polyak_model.weight_files.refusal import DAMAGE, in_one_line, refusal
from polyak_model.weight_files.tensor import Variable

_NUMBERS = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_DEEPEST = 100
# Deflate cannot shrink more than 1032 to 1.
_MOST_EXPANSION = 1100
_SMALL = 64 * 2**20
# They are built in; others would be loaded as plugins.
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32} | {
    h5py.h5z.FILTER_LZF
}
_LONGEST_ATTRIBUTE = 2**16


def list_variables(hdf5, file, source):
    """Finds every tensor of an HDF5 file, and reads none.

    Args:
        hdf5: An open `h5py.File`.
        file: The `GuardedFile` that it reads.
        source: The path of the file, for errors.

    Returns:
        A dict from name to `Variable`, and a dict from the name of each group
        to its attributes; that of the outermost is "".

    Raises:
        InputError: If the file is damaged or holds what no weight file does.
    """
    variables, attributes = {}, {}
    try:
        creation = hdf5.id.get_create_plist()
        # The checks of `GuardedFile` take lengths of eight bytes for granted, `Variable` no block.
        if creation.get_sizes() != (8, 8) or creation.get_userblock():
            raise refusal(source, "its header is one that Keras does not write")
        for name, item in _walk(h5py.h5g.open(hdf5.id, b"/"), source):
            if isinstance(item, h5py.h5g.GroupID):
                attributes[name] = _read_attributes(item, name, source)
            else:
                dtype = _check_tensor(item, name, file.size, source)
                variables[name] = Variable(name, dtype, item, file, source)
    except InputError:
        raise
    except DAMAGE as error:
        raise refusal(source, f"it is damaged ({in_one_line(error)})") from error
    return variables, attributes


def _walk(root, source):
    """Yields every group and dataset by name."""
    yield "", root
    seen = {h5py.h5o.get_info(root).addr}
    waiting = [("", root)]
    while waiting:
        prefix, group = waiting.pop()
        inside = []
        for key in group:
            name = f"{prefix}/{key.decode()}".removeprefix("/")
            # HDF5 would take it for a path, and follow the links on it.
            if b"/" in key:
                raise refusal(source, f"{name!r} has a name that is none")
            if not name.isprintable() or name.count("/") >= _DEEPEST:
                raise refusal(source, "it has a group with unprintable text or too deep in others")
            if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                raise refusal(source, f"{name!r} is a link, which could point anywhere")
            item = h5py.h5o.open(group, key)
            if not isinstance(item, h5py.h5g.GroupID | h5py.h5d.DatasetID):
                raise refusal(source, f"{name!r} is neither a group nor a tensor")
            yield name, item
            if isinstance(item, h5py.h5g.GroupID):
                address = h5py.h5o.get_info(item).addr
                if address in seen:
                    raise refusal(source, f"{name!r} also has another name, as in an endless loop")
                seen.add(address)
                inside.append((name, item))
        waiting.extend(reversed(inside))


def _check_tensor(dataset, name, size, source):
    """Returns the dtype as Keras names it."""
    creation = dataset.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL or creation.get_external_count():
        raise refusal(source, f"{name!r} takes its numbers from another file")
    stored = dataset.dtype
    dtype = _keras_dtype(dataset, stored)
    # What NumPy has no name for, HDF5 would convert, but it is read as it lies.
    if dtype is None or not dataset.get_type().equal(h5py.h5t.py_create(stored)):
        raise refusal(source, f"{name!r} holds {stored}, no weights")
    shape = dataset.shape
    if shape is None:
        raise refusal(source, f"{name!r} has no shape")
    if not _holds(dataset, creation, math.prod(shape) * stored.itemsize, size):
        problem = f"declares the shape {shape}, {stored}, which does not fit into the file"
        raise refusal(source, f"{name!r} {problem}")
    return dtype


def _holds(dataset, creation, declared, size):
    """Tells whether the declared bytes are in the file, or can have been compressed into it."""
    stored = dataset.get_storage_size()
    if not 0 <= stored <= size:
        return False
    if creation.get_layout() != h5py.h5d.CHUNKED:
        return declared <= stored and (dataset.get_offset() or 0) + declared <= size
    chunk = math.prod(creation.get_chunk()) * dataset.dtype.itemsize
    filters = {creation.get_filter(i)[0] for i in range(creation.get_nfilters())}
    if chunk > max(_SMALL, declared) or filters - _FILTERS:
        return False
    return declared <= (max(_SMALL, _MOST_EXPANSION * stored) if filters else stored)


def _keras_dtype(dataset, stored):
    if stored.name in _NUMBERS:
        return stored.name
    # Keras writes bfloat16, which HDF5 does not know, as two opaque bytes.
    if stored != np.dtype("V2") or not h5py.h5a.exists(dataset, b"dtype"):
        return None
    is_marked = _read_attribute(h5py.Dataset(dataset), "dtype") == "bfloat16"
    return "bfloat16" if is_marked else None


def _read_attributes(group, name, source):
    if not h5py.h5a.get_num_attrs(group):
        return {}
    group = h5py.Group(group)
    attributes = {key: _read_attribute(group, key) for key in group.attrs}
    for key, value in attributes.items():
        if value is None:
            raise refusal(source, f"the attribute {key!r} of {name!r} is no text and no number")
    return attributes


def _read_attribute(item, key):
    """Returns None for what is long or something other than text or numbers."""
    identifier = item.attrs.get_id(key)
    # A damaged file may declare billions of texts in a few bytes.
    length = max(identifier.get_storage_size(), 8 * math.prod(identifier.shape or ()))
    if length > _LONGEST_ATTRIBUTE:
        return None
    dtype = identifier.dtype
    if dtype.kind not in "biufSU" and h5py.check_string_dtype(dtype) is None:
        return None
    value = item.attrs[key]
    # HDF5 reads bytes that are no text, too, but cannot write them again.
    "".join(map(str, np.ravel(value))).encode()
    return value
