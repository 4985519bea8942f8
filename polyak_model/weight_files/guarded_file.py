"""Bytes for HDF5 to read: those of one file or of a part of it, checked where HDF5 does not."""

import io
import struct
import threading

_HEAP = struct.Struct("<4sB3xQ")
_OBJECT = struct.Struct("<HH4xQ")
_SIGNATURE = b"GCOL"
_LARGEST_HEAP = 2**20


class GuardedFile(io.RawIOBase):
    """A part of a file as a file of its own, for `h5py.File`.

    HDF5 keeps text in heaps, which are chains of objects, and follows a chain
    that stands still for ever. So each heap is checked when it is read.

    Args:
        file: A binary file that can seek.
        offset: Where the part begins. Defaults to 0.
        size: How many bytes it has. Defaults to None: all that follow.
    """

    def __init__(self, file, offset=0, size=None):
        self._file = file
        self._offset = offset
        self._size = file.seek(0, io.SEEK_END) - offset if size is None else size
        self._position = 0
        self._turn = threading.Lock()

    @property
    def size(self):
        """How many bytes it has."""
        return self._size

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer):
        buffer = memoryview(buffer).cast("B")
        self.read_at(self._position, buffer)
        if buffer[:4] == _SIGNATURE:
            self._check_heap(self._position)
        self._position += len(buffer)
        return len(buffer)

    def read_at(self, position, buffer):
        """Fills a buffer with the bytes from a position on; threads may do so at once.

        Args:
            position: Of the first byte, from the beginning of the part.
            buffer: A memoryview of bytes.

        Raises:
            OSError: If the part ends before.
        """
        if len(buffer) > self._size - position:
            raise OSError(f"it ends before byte {position + len(buffer):,}")
        with self._turn:
            self._file.seek(self._offset + position)
            count = self._file.readinto(buffer)
        if count != len(buffer):
            raise OSError("it was cut off while it was read")

    def _check_heap(self, start):
        _, _, size = _HEAP.unpack(self._bytes(_HEAP.size, start))
        if size > _LARGEST_HEAP:
            raise OSError(f"the text at byte {start:,} is longer than {_LARGEST_HEAP:,} bytes")
        heap = self._bytes(size, start)
        position = _HEAP.size
        while position + _OBJECT.size <= size:
            index, _, length = _OBJECT.unpack_from(heap, position)
            # Objects are padded to eight bytes; the free space, which is object 0, counts its head.
            step = _OBJECT.size + (length + 7) // 8 * 8 if index else length
            if step < 1 or position + step > size:
                raise OSError(f"the text at byte {start + position:,} has no end")
            position += step

    def _bytes(self, count, position):
        block = bytearray(count)
        self.read_at(position, memoryview(block))
        return block
