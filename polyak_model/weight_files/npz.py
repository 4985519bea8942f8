"""Arrays of an .npz file, read without running code from it."""

import zipfile
import zlib

import numpy as np

_FAILURES = (
    EOFError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class ArraysError(ValueError):
    """Why arrays cannot be used.

    Args:
        problem: What is wrong with the file, to follow its name.
        remedy: How to mend it.
    """

    def __init__(self, problem, remedy):
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy


def read_arrays(path, example):
    """Reads all arrays of an .npz file.

    Args:
        path: Its path.
        example: How to write such a file, e.g. `numpy.savez(file, x=x, y=y)`.

    Returns:
        A dict from name to array; a member of the archive that is no array comes
        as bytes.

    Raises:
        ArraysError: If the file is missing, damaged, or holds objects.
    """
    try:
        with open(path, "rb") as file:
            arrays = np.load(file, allow_pickle=False)
            arrays = dict(arrays) if isinstance(arrays, np.lib.npyio.NpzFile) else None
    except FileNotFoundError as error:
        raise ArraysError("which does not exist", "Check the path") from error
    except _FAILURES as error:
        raise ArraysError(
            f"which cannot be read as arrays of numbers ({type(error).__name__})",
            f"Write it with {example}, without object arrays",
        ) from error
    if arrays is None:
        raise ArraysError(
            "which holds a single array without a name", f"Name the arrays: {example}"
        )
    return arrays
