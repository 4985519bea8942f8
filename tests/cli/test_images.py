import pickle
import zipfile

import numpy as np
import pytest

from polyak_model.cli.demo.images import load_images, split
from polyak_model.errors import InputError

IMAGES = np.arange(20 * 4 * 4, dtype="uint8").reshape(20, 4, 4)
LABELS = np.arange(20) % 3


@pytest.fixture
def write(tmp_path):
    """Writes arrays into an .npz file and returns its path."""

    def write(**arrays):
        path = tmp_path / "images.npz"
        np.savez(path, **arrays)
        return path

    return write


def test_mnist_has_five_thousand_images_in_the_unit_interval():
    x, y = load_images()
    assert (x.shape, x.dtype, x.min(), x.max()) == ((5000, 28, 28, 1), np.float32, 0, 1)
    np.testing.assert_array_equal(np.bincount(y), [500] * 10)


def test_bytes_are_scaled_to_the_unit_interval(write):
    x, _ = load_images(write(x=IMAGES, y=LABELS))
    np.testing.assert_array_equal(x[..., 0], IMAGES / np.float32(255))


@pytest.mark.parametrize("dtype", ["float64", "float32", "int32", "bool"])
def test_other_numbers_are_taken_as_they_are(write, dtype):
    images = IMAGES.astype(dtype)
    x, _ = load_images(write(x=images, y=LABELS))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x[..., 0], images)


def test_channels_are_kept(write):
    images = np.zeros((20, 4, 5, 3), "float32")
    assert load_images(write(x=images, y=LABELS))[0].shape == (20, 4, 5, 3)


def test_labels_are_numbered_from_zero(write):
    _, y = load_images(write(x=IMAGES, y=np.where(LABELS == 2, -7, LABELS)))
    np.testing.assert_array_equal(y, (LABELS + 1) % 3)


def test_a_split_is_a_partition_that_keeps_images_with_their_labels():
    x = np.arange(50)
    (x_training, y_training), (x_held_out, y_held_out) = split(x, x % 7, seed=3)
    assert (len(x_training), len(x_held_out)) == (40, 10)
    np.testing.assert_array_equal(np.sort(np.concatenate([x_training, x_held_out])), x)
    np.testing.assert_array_equal(y_training, x_training % 7)
    np.testing.assert_array_equal(y_held_out, x_held_out % 7)


def test_the_seed_alone_decides_the_split():
    x = np.arange(50)
    held_out = [split(x, x, seed)[1][0].tolist() for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"y": LABELS}, "has no `x`, only ['y']"),
        ({"x": IMAGES}, "has no `y`, only ['x']"),
        ({"images": IMAGES}, "has no `x` and no `y`, only ['images']"),
        ({"x": IMAGES, "y": LABELS[:-1]}, "20 images and 19 labels"),
        ({"x": IMAGES[0], "y": LABELS}, "`x` has shape (4, 4)"),
        ({"x": IMAGES[:, :0], "y": LABELS}, "`x` has shape (20, 0, 4)"),
        ({"x": IMAGES.astype(str), "y": LABELS}, "`x` has dtype <U3"),
        ({"x": IMAGES.astype(object), "y": LABELS}, "cannot be read as arrays of numbers"),
        ({"x": IMAGES * np.nan, "y": LABELS}, "`x` contains inf or NaN"),
        ({"x": IMAGES, "y": LABELS[:, None]}, "`y` has shape (20, 1)"),
        ({"x": IMAGES, "y": LABELS * 1.0}, "`y` has dtype float64"),
        ({"x": IMAGES, "y": LABELS.astype(str)}, "`y` has dtype <U21"),
        ({"x": IMAGES, "y": LABELS.astype(object)}, "cannot be read as arrays of numbers"),
        ({"x": IMAGES[:9], "y": LABELS[:9]}, "9 images and 3 classes"),
        ({"x": IMAGES, "y": LABELS * 0}, "20 images and 1 classes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(write, arrays, problem):
    check_refusal(write(**arrays), problem)


def test_only_images_and_labels_are_read(write):
    path = write(x=IMAGES, y=LABELS, names=np.array(["a", None]))
    np.testing.assert_array_equal(load_images(path)[1], LABELS)


def check_refusal(path, problem):
    with pytest.raises(InputError) as caught:
        load_images(path)
    message = str(caught.value)
    assert problem in message
    assert repr(str(path)) in message
    assert len(message.splitlines()) == 1


def test_a_missing_file_is_refused(tmp_path):
    check_refusal(tmp_path / "nowhere.npz", "does not exist")


def test_a_folder_is_refused(tmp_path):
    check_refusal(tmp_path, "cannot be read")


@pytest.mark.parametrize(
    "content", [b"", b"x,y\n1,2\n", b"PK\x03\x04 cut off", pickle.dumps([1, 2])]
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    check_refusal(path, "cannot be read")


def test_a_single_array_is_refused(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, IMAGES)
    check_refusal(path, "a single array")


def test_a_damaged_file_is_refused(write):
    path = write(x=IMAGES, y=LABELS)
    content = bytearray(path.read_bytes())
    content[250:300] = bytes(50)
    path.write_bytes(content)
    check_refusal(path, "cannot be read")


def test_an_archive_of_text_files_is_refused(tmp_path):
    path = tmp_path / "images.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "images")
        archive.writestr("y", "labels")
    check_refusal(path, "cannot be read as arrays of numbers (ValueError)")
