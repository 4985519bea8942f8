"""Lists the tensors of an untrusted HDF5 file.

HDF5 can refer to other files, declare tensors that are not there, nest endlessly
and unpack kilobytes to gigabytes. Weight files of Keras do not, so a file that
does is refused.
"""

import io
import math
import struct
import threading

import h5py
import numpy as np

from polyak_model.weight_files.refusal import refusal, refusing
from polyak_model.weight_files.tensor import Variable

_HEAP = struct.Struct("<4sB3xQ")
_OBJECT = struct.Struct("<HH4xQ")
_HEAP_SIGNATURE = b"GCOL"
_LARGEST_HEAP = 2**20

_NUMBERS = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_DEEPEST = 100
# Built into HDF5; others would be loaded as plugins.
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_LZF,
    h5py.h5z.FILTER_SHUFFLE,
}
# HDF5 unpacks a chunk as a whole, in memory.
_LARGEST_CHUNK = 64 * 2**20
# Limits of what all packed tensors of a file unpack to.
_SMALL = 64 * 2**20
_MOST_EXPANSION = 100
_LONGEST_ATTRIBUTE = 2**16


class GuardedFile(io.RawIOBase):
    """A part of a file as a file of its own, for `h5py.File`.

    HDF5 stores text in heaps, which are chains of objects, and follows a chain
    with a step of zero for ever. So each heap is checked when it is read.

    Args:
        file: A binary file that can seek.
        offset: Position of the first byte of the part. Defaults to 0.
        size: Number of bytes. Defaults to None: all that follow.
        packed_size: Number of bytes on disk, if the part was compressed there.
            Defaults to None: `size`.
    """

    def __init__(self, file, offset=0, size=None, packed_size=None):
        self._file = file
        self._offset = offset
        self._position = 0
        self._lock = threading.Lock()
        self.size = file.seek(0, io.SEEK_END) - offset if size is None else size
        self.packed_size = self.size if packed_size is None else packed_size

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer):
        buffer = memoryview(buffer).cast("B")
        self.read_at(self._position, buffer)
        if buffer[:4] == _HEAP_SIGNATURE:
            self._check_heap(self._position)
        self._position += len(buffer)
        return len(buffer)

    def read_at(self, position, buffer):
        """Fills a buffer with the bytes from a position on; safe to call from several threads.

        Args:
            position: Of the first byte, relative to the part.
            buffer: A memoryview of bytes.

        Raises:
            OSError: If the part ends before the buffer is full.
        """
        if len(buffer) > self.size - position:
            raise OSError(f"it ends before byte {position + len(buffer):,}")
        with self._lock:
            self._file.seek(self._offset + position)
            count = self._file.readinto(buffer)
        if count != len(buffer):
            raise OSError("it was truncated while it was read")

    def _check_heap(self, start):
        _, _, size = _HEAP.unpack(self._bytes(_HEAP.size, start))
        if size > _LARGEST_HEAP:
            raise OSError(f"the text at byte {start:,} is longer than {_LARGEST_HEAP:,} bytes")
        heap = self._bytes(size, start)
        position = _HEAP.size
        while position + _OBJECT.size <= size:
            index, _, length = _OBJECT.unpack_from(heap, position)
            # Objects are padded to eight bytes; the length of object 0, the free space, includes
            # its header.
            step = _OBJECT.size + (length + 7) // 8 * 8 if index else length
            if step < 1 or position + step > size:
                raise OSError(f"the text at byte {start + position:,} has no end")
            position += step

    def _bytes(self, count, position):
        block = bytearray(count)
        self.read_at(position, memoryview(block))
        return block


def list_variables(hdf5, file, source):
    """Finds every tensor of an HDF5 file without reading it.

    Args:
        hdf5: An open `h5py.File`.
        file: The `GuardedFile` that it reads.
        source: The path of the file, for errors.

    Returns:
        A dict from name to `Variable`, and a dict from the name of each group
        to its attributes; the outermost group is "".

    Raises:
        InputError: If the file is damaged or contains what no weight file does.
    """
    variables, attributes = {}, {}
    packed = 0
    with refusing(source, "it is damaged"):
        _check_header(hdf5, source)
        for name, item in _walk(h5py.h5g.open(hdf5.id, b"/"), source):
            if isinstance(item, h5py.h5g.GroupID):
                attributes[name] = _read_attributes(item, name, source)
            else:
                dtype = _check_tensor(item, name, file.size, source)
                variables[name] = Variable(name, dtype, item, file, source)
                packed += variables[name].nbytes * bool(item.get_create_plist().get_nfilters())
                if packed > max(_SMALL, _MOST_EXPANSION * file.packed_size):
                    raise refusal(
                        source,
                        f"its compressed tensors unpack to more than {_MOST_EXPANSION} times the "
                        "size of the file",
                        "Save them without compression",
                    )
    return variables, attributes


def read_attribute(item, key):
    """Reads an attribute that is text or numbers.

    Args:
        item: An `h5py.Group` or `h5py.Dataset`.
        key: Name of the attribute.

    Returns:
        Its value; None if it is long, or neither text nor numbers.
    """
    identifier = item.attrs.get_id(key)
    # A damaged file may declare billions of texts in a few bytes.
    length = max(identifier.get_storage_size(), 8 * math.prod(identifier.shape or ()))
    if length > _LONGEST_ATTRIBUTE:
        return None
    dtype = identifier.dtype
    if dtype.kind not in "biufSU" and h5py.check_string_dtype(dtype) is None:
        return None
    value = item.attrs[key]
    # HDF5 also reads bytes that are no valid text, but cannot write them.
    "".join(map(str, np.ravel(value))).encode()
    return value


def _check_header(hdf5, source):
    creation = hdf5.id.get_create_plist()
    # `GuardedFile` assumes lengths of eight bytes, `Variable` that there is no user block.
    if creation.get_sizes() != (8, 8) or creation.get_userblock():
        raise refusal(source, "its header is not one that Keras writes")
    if any(key == "keras_version" or key.startswith("layer_names") for key in hdf5.attrs):
        raise refusal(
            source,
            "it has the layout of Keras 2, which belongs in files named .h5",
            "Rename it to end in .h5, load it with keras.models.load_model, or with "
            "model.load_weights if it contains weights alone, and save the model as .keras",
        )


def _walk(root, source):
    """Yields every group and dataset with its name."""
    yield "", root
    seen = {h5py.h5o.get_info(root).addr}
    pending = [("", root)]
    while pending:
        prefix, group = pending.pop()
        inside = []
        for key in group:
            name = f"{prefix}/{key.decode()}".removeprefix("/")
            # HDF5 would take it for a path, and follow the links on it.
            if b"/" in key:
                raise refusal(source, f"{name!r} has an invalid name")
            if not name.isprintable() or name.count("/") >= _DEEPEST:
                raise refusal(source, "a group has an unprintable name or is nested too deep")
            if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                raise refusal(source, f"{name!r} is a link, which could point anywhere")
            item = h5py.h5o.open(group, key)
            if not isinstance(item, h5py.h5g.GroupID | h5py.h5d.DatasetID):
                raise refusal(source, f"{name!r} is neither a group nor a tensor")
            # Two names could be an endless loop, or unpack one tensor many times.
            address = h5py.h5o.get_info(item).addr
            if address in seen:
                raise refusal(source, f"{name!r} has a second name")
            seen.add(address)
            yield name, item
            if isinstance(item, h5py.h5g.GroupID):
                inside.append((name, item))
        pending.extend(reversed(inside))


def _check_tensor(dataset, name, size, source):
    """Returns the dtype of a tensor as Keras names it."""
    creation = dataset.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL or creation.get_external_count():
        raise refusal(source, f"{name!r} takes its numbers from another file")
    stored = dataset.dtype
    dtype = _keras_dtype(dataset, stored)
    # HDF5 would convert types that NumPy has no name for, but tensors are read without HDF5.
    if dtype is None or not dataset.get_type().equal(h5py.h5t.py_create(stored)):
        raise refusal(source, f"{name!r} has dtype {stored}, which no weights have")
    shape = dataset.shape
    if shape is None:
        raise refusal(source, f"{name!r} has no shape")
    declared = math.prod(shape) * stored.itemsize
    if creation.get_nfilters():
        _check_packed(dataset, creation, name, source)
    elif not _fits(dataset, creation, declared, size):
        problem = f"declares the shape {shape}, {stored}, which does not fit into the file"
        raise refusal(source, f"{name!r} {problem}")
    return dtype


def _check_packed(dataset, creation, name, source):
    unpack = "Save it without compression"
    if not {creation.get_filter(i)[0] for i in range(creation.get_nfilters())} <= _FILTERS:
        raise refusal(source, f"{name!r} has an unusual compression", unpack)
    chunk = math.prod(creation.get_chunk()) * dataset.dtype.itemsize
    if chunk > _LARGEST_CHUNK:
        raise refusal(
            source,
            f"{name!r} is packed in chunks of {chunk:,} bytes, more than {_LARGEST_CHUNK:,}",
            unpack,
        )


def _fits(dataset, creation, declared, size):
    """Returns whether the declared bytes of an uncompressed tensor are in the file."""
    stored = dataset.get_storage_size()
    if not 0 <= stored <= size:
        return False
    if creation.get_layout() != h5py.h5d.CHUNKED:
        return declared <= stored and (dataset.get_offset() or 0) + declared <= size
    chunk = math.prod(creation.get_chunk()) * dataset.dtype.itemsize
    return declared <= stored and chunk <= max(_LARGEST_CHUNK, declared)


def _keras_dtype(dataset, stored):
    if stored.name in _NUMBERS:
        return stored.name
    # Keras writes bfloat16, which HDF5 does not know, as two opaque bytes.
    if stored != np.dtype("V2") or not h5py.h5a.exists(dataset, b"dtype"):
        return None
    is_marked = read_attribute(h5py.Dataset(dataset), "dtype") == "bfloat16"
    return "bfloat16" if is_marked else None


def _read_attributes(group, name, source):
    if not h5py.h5a.get_num_attrs(group):
        return {}
    group = h5py.Group(group)
    attributes = {key: read_attribute(group, key) for key in group.attrs}
    for key, value in attributes.items():
        if value is None:
            raise refusal(
                source, f"the attribute {key!r} of {name!r} is neither text nor a number, or long"
            )
    return attributes
