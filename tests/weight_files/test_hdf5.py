import h5py
import numpy as np
import pytest
from weight_samples import write_hdf5

from polyak_model.errors import InputError
from polyak_model.weight_files.reader import open_weights

ZEROS = {"shape": (3,), "dtype": "float32"}


def outside(file):
    layout = h5py.VirtualLayout((3,), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "vars/0", (3,))
    file.create_virtual_dataset("vars/1", layout)


def hard_cycle(file):
    file["vars/again"] = file["vars"]


def deep(file):
    file.create_group("/".join("a" * 200))


def soft_link(file):
    file["vars/1"] = h5py.SoftLink("/vars/0")


def external_link(file):
    file["vars/1"] = h5py.ExternalLink("/etc/passwd", "/")


def dangling_link(file):
    file["vars/1"] = h5py.SoftLink("/nowhere")


def external_storage(file):
    file.create_dataset("vars/1", **ZEROS, external=[("/etc/passwd", 0, 12)])


def nothing_written(file):
    file.create_dataset("vars/1", (2**40,), "float32")


def compressed_bomb(file):
    file.create_dataset("vars/1", (2**40,), "float32", chunks=(2**20,), compression="gzip")


def huge_chunk(file):
    file.create_dataset("vars/1", (1,), "int8", chunks=(2**30,), maxshape=(None,))


def half_written(file):
    dataset = file.create_dataset("vars/1", (4,), "float32", chunks=(2,))
    dataset[:2] = 1


def text(file):
    file["vars/1"] = "text"


def compound(file):
    file["vars/1"] = np.zeros(3, [("a", "f4"), ("b", "i4")])


def complex_numbers(file):
    file["vars/1"] = np.zeros(3, "complex64")


def unmarked_opaque(file):
    file["vars/1"] = np.zeros(3, "V2")


def opaque_marked_otherwise(file):
    unmarked_opaque(file)
    file["vars/1"].attrs["dtype"] = "float8"


def reference(file):
    file.create_dataset("vars/1", (1,), h5py.ref_dtype)


def no_shape(file):
    file["vars/1"] = h5py.Empty("float32")


def named_type(file):
    file["vars/1"] = np.dtype("float32")


def unusual_float(file):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 20, 11, 0, 20)
    kind.set_ebias(1023)
    space = h5py.h5s.create_simple((3,))
    h5py.h5d.create(file["vars"].id, b"1", kind, space).write(space, space, np.ones(3))


def other_filter(file):
    file.create_dataset("vars/1", (4,), "int32", chunks=(4,), scaleoffset=0)[:] = 1


def reference_attribute(file):
    file["vars"].attrs["name"] = file["vars"].ref


def many_texts(file):
    file["vars"].attrs.create("name", [b"a"] * 9000, dtype="S1")


def attribute_of_other_bytes(file):
    kind = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
    attribute = h5py.h5a.create(file["vars"].id, b"other", kind, h5py.h5s.create(h5py.h5s.SCALAR))
    attribute.write(np.array(b"a\xe5b", h5py.string_dtype()))


def unprintable_name(file):
    file["vars/a\nb"] = 1.0


@pytest.mark.parametrize(
    ("add", "problem"),
    [
        (outside, "another file"),
        (external_storage, "another file"),
        (hard_cycle, "has a second name"),
        (deep, "too deep"),
        (unprintable_name, "unprintable"),
        (soft_link, "'vars/1' is a link"),
        (external_link, "'vars/1' is a link"),
        (dangling_link, "'vars/1' is a link"),
        (nothing_written, "does not fit into the file"),
        (compressed_bomb, "unpack to more than 100 times the size of the file"),
        (huge_chunk, "does not fit into the file"),
        (half_written, "does not fit into the file"),
        (other_filter, "has an unusual compression"),
        (text, "which no weights have"),
        (compound, "which no weights have"),
        (complex_numbers, "'vars/1' has dtype complex64, which no weights have"),
        (unmarked_opaque, "which no weights have"),
        (opaque_marked_otherwise, "which no weights have"),
        (reference, "which no weights have"),
        (unusual_float, "which no weights have"),
        (no_shape, "no shape"),
        (named_type, "neither a group nor a tensor"),
        (reference_attribute, "is neither text nor a number"),
        (attribute_of_other_bytes, "it is damaged ('utf-8' codec"),
        (many_texts, "is neither text nor a number"),
    ],
)
def test_a_file_with_anything_but_weights_is_refused(tmp_path, monkeypatch, add, problem):
    monkeypatch.chdir(tmp_path)
    path = write_hdf5(tmp_path / "a.weights.h5", {"vars/0": np.ones(3, "float32")})
    write_hdf5(tmp_path / "other.h5", {"vars/0": np.ones(3, "float32")})
    with h5py.File(path, "a") as file:
        add(file)
    with pytest.raises(InputError) as caught, open_weights(path):
        pass
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_name_with_a_slash_is_not_followed_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "group/link"
    write_hdf5(tmp_path / "other.h5", {"vars/0": np.ones(3, "float32")})
    path = tmp_path / "a.weights.h5"
    plain = "x" * len(name)
    with h5py.File(path, "w") as file:
        file[plain] = np.ones(3, "float32")
        file["group/link"] = h5py.ExternalLink("other.h5", "/vars/0")
    path.write_bytes(path.read_bytes().replace(plain.encode(), name.encode()))
    with pytest.raises(InputError, match="has an invalid name"), open_weights(path):
        pass


def test_a_file_with_a_user_block_is_refused(tmp_path):
    path = tmp_path / "a.weights.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["vars/0"] = 1.0
    with pytest.raises(InputError, match="its header"), open_weights(path):
        pass


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"compression": "lzf"}])
def test_every_version_of_the_format_is_listed(tmp_path, libver, options):
    path = tmp_path / "a.weights.h5"
    arrays = {f"layers/dense_{n}/vars/{n}": np.full(40, n, "float32") for n in range(30)}
    with h5py.File(path, "w", libver=libver) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **options)
            file[name].parent.attrs["texts"] = ["a", "b"]
    with open_weights(path) as weights:
        assert weights.variables.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(weights.variables[name].read(), array)
            parent = name.rpartition("/")[0]
            np.testing.assert_array_equal(weights.attributes[parent]["texts"], ["a", "b"])


def test_a_small_tensor_may_be_compressed_to_any_size(tmp_path):
    zeros = {"vars/0": np.zeros(10**6, "float32")}
    path = write_hdf5(tmp_path / "a.weights.h5", zeros, compression="gzip", compression_opts=9)
    assert path.stat().st_size < 40000
    with open_weights(path) as weights:
        assert not weights.variables["vars/0"].read().any()
