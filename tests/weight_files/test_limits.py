"""Small files that would take gigabytes of memory or time are refused, each in one line."""

import os
import pathlib
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
from weight_samples import TENSORS, WRITERS, write_hdf5, write_keras

import polyak_model
from polyak_model.checkpoints import average_files
from polyak_model.errors import InputError
from polyak_model.weight_files import npz
from polyak_model.weight_files.npz import ArraysError, load_held_out, read_arrays
from polyak_model.weight_files.reader import open_weights
from polyak_model.weight_files.selection import choose_best

MEGABYTE = 2**20


def refused(path):
    with pytest.raises(InputError) as caught, open_weights(path):
        pass
    assert str(caught.value).isprintable()
    return str(caught.value)


def write_packed(path, size, chunk, count=1, names=1):
    """Writes tensors of zeros, packed about 1000 to 1, without unpacking them here."""
    with h5py.File(path, "w") as file:
        for n in range(count):
            name = f"layers/dense_{n}/vars/0"
            options = {"chunks": (chunk,), "compression": "gzip", "compression_opts": 9}
            file.create_dataset(name, (size,), "int8", **options)
            for start in range(0, size, chunk):
                file[name][start : start + chunk] = np.zeros(min(chunk, size - start), "int8")
            for k in range(1, names):
                file[f"layers/dense_{n}/vars/{k}"] = file[name]
    return path


def test_a_large_packed_chunk_is_refused(tmp_path):
    path = write_packed(tmp_path / "a.weights.h5", 80 * MEGABYTE, 80 * MEGABYTE)
    assert path.stat().st_size < MEGABYTE
    assert "'layers/dense_0/vars/0' is packed in chunks of 83,886,080 bytes" in refused(path)


def test_many_names_of_one_packed_tensor_are_refused(tmp_path):
    path = write_packed(tmp_path / "a.weights.h5", 60 * MEGABYTE, MEGABYTE, names=60)
    assert "has a second name" in refused(path)


def test_many_packed_tensors_are_refused_by_their_sum(tmp_path):
    path = write_packed(tmp_path / "a.weights.h5", 30 * MEGABYTE, MEGABYTE, count=3)
    assert "unpack to more than 100 times the size of the file" in refused(path)


def test_tensors_packed_twice_are_refused_by_the_size_on_disk(tmp_path):
    weights = write_packed(tmp_path / "a.weights.h5", 50 * MEGABYTE, MEGABYTE, count=2)
    with open(weights, "ab") as file:  # Padding that zip packs in turn.
        file.write(bytes(5 * MEGABYTE))
    with open_weights(weights) as file:
        assert len(file.variables) == 2
    path = write_keras(tmp_path / "a.keras", weights.read_bytes(), compression=zipfile.ZIP_DEFLATED)
    assert "unpack to more than 100 times the size of the file" in refused(path)


def test_members_that_unpack_to_much_in_sum_are_refused(tmp_path):
    members = {f"assets/{n}": bytes(60 * MEGABYTE) for n in range(2)}
    path = write_keras(tmp_path / "a.keras", compression=zipfile.ZIP_DEFLATED, **members)
    assert "it unpacks to more than 100 times its size" in refused(path)


def test_a_config_of_millions_of_lists_is_refused(tmp_path):
    text = b'{"a": [' + b"[]," * 2 * 10**6 + b"[]]}"
    assert "its config.json has more than 1,000,000 lists" in refused(
        write_keras(tmp_path / "a.keras", **{"config.json": text})
    )


def test_moderately_packed_tensors_are_read(tmp_path):
    array = np.random.default_rng(0).integers(0, 4, (1000, 1000)).astype("float32")
    path = write_hdf5(tmp_path / "a.weights.h5", {"vars/0": array}, compression="gzip")
    with open_weights(path) as weights:
        np.testing.assert_array_equal(weights.variables["vars/0"].read(), array)


PEAK = """
import resource, sys
from polyak_model.checkpoints import average_files
from polyak_model.weight_files.npz import load_held_out
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {call}
except ValueError as error:
    print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 300 * 1024, f"{{grown / 1024:.0f}} MB"
"""


@pytest.mark.memory
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_unused_arrays_of_held_out_data_are_not_read(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((3, 2)), y=np.ones(3))
    size = 600 * MEGABYTE
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("unused.npy", "w") as member,
    ):
        header = {"descr": "|i1", "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(600):
            member.write(bytes(MEGABYTE))
    call = f"print([array.shape for array in load_held_out({str(path)!r})])"
    assert run(PEAK.format(call=call)) == "[(3, 2), (3,)]\n"


def run(program):
    root = str(pathlib.Path(polyak_model.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_packed_held_out_data_is_refused_before_it_is_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "data.npz", x=np.zeros((70 * MEGABYTE, 1), "int8"), y=[1])
    with pytest.raises(InputError, match="more than 100 times its size. Write it without compre"):
        load_held_out(tmp_path / "data.npz")


@pytest.mark.parametrize("shape", [(2**40,), (2,), (4,), (-3,), (2**70, 2**70)])
def test_a_header_that_declares_another_size_is_refused(tmp_path, shape):
    with (
        zipfile.ZipFile(tmp_path / "data.npz", "w") as archive,
        archive.open("x.npy", "w") as member,
    ):
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(24))
    with pytest.raises(ArraysError, match="cannot be read as arrays of numbers"):
        read_arrays(tmp_path / "data.npz", "")


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"{'descr': '<f8'}", b"(" * 5000, b"\xff", b"{'descr': (), '''", b"[1]" * 9],
)
def test_any_header_of_an_array_is_read_or_refused(tmp_path, header):
    magic = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little")
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", magic + header)
    with pytest.raises(ArraysError) as caught:
        read_arrays(tmp_path / "data.npz", "")
    assert str(caught.value).isprintable()


def test_the_arrays_that_are_read_are_named_by_the_caller(tmp_path, monkeypatch):
    np.savez(tmp_path / "data.npz", x=np.ones(3), y=np.ones(3), z=np.ones(3))
    read = []
    monkeypatch.setattr(npz, "_read", lambda archive, member: read.append(member.filename))
    read_arrays(tmp_path / "data.npz", "", lambda names: [name for name in names if name != "y"])
    assert read == ["x.npy", "z.npy"]


def block(path):
    os.mkfifo(path)


def never_end(path):
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.parametrize("make", [block, never_end, pathlib.Path.mkdir])
def test_only_regular_files_are_read(tmp_path, make):
    expected = "it is a folder" if make is pathlib.Path.mkdir else "it is not a regular file"
    for ending in WRITERS:
        make(tmp_path / f"a{ending}")
        assert expected in refused(tmp_path / f"a{ending}")
    make(tmp_path / "data.npz")
    with pytest.raises(InputError, match=expected):
        load_held_out(tmp_path / "data.npz")
    make(tmp_path / "history.csv")
    with pytest.raises(InputError, match=expected):
        choose_best(["1.keras", "2.keras"], 2, tmp_path / "history.csv", "loss", "min")


def test_a_history_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "history.csv", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="it is longer than 16,777,216 bytes"):
        choose_best(["1.keras", "2.keras"], 2, tmp_path / "history.csv", "loss", "min")


ESCAPE = "\x1b[2J\x07"


def test_terminal_escapes_in_a_file_or_its_name_are_not_in_a_message(tmp_path):
    history = tmp_path / f"history{ESCAPE}.csv"
    history.write_text(f"epoch{ESCAPE},loss\n0,1\n")
    lines = []
    for column in ("loss", f"val{ESCAPE}"):
        with pytest.raises(InputError) as caught:
            choose_best(["1.keras", "2.keras"], 2, history, column, "min")
        lines.append(str(caught.value))
    np.savez(tmp_path / "data.npz", **{f"x{ESCAPE}": [1]})
    with pytest.raises(InputError) as caught:
        load_held_out(tmp_path / "data.npz")
    lines.append(str(caught.value))
    path = write_hdf5(tmp_path / f"a{ESCAPE}.weights.h5")
    with h5py.File(path, "a") as file:
        file["layers"].attrs[f"a{ESCAPE}"] = np.zeros(3, "complex64")
    lines.append(refused(path))
    lines.append(refused(tmp_path / f"missing{ESCAPE}.keras"))
    assert all(line.isprintable() for line in lines)


def test_every_escape_is_escaped_in_an_input_error():
    everything = "".join(map(chr, range(0x300)))
    assert str(InputError(everything)).isprintable()
    assert str(InputError("Größe: 1 → 2…")) == "Größe: 1 → 2…"


def test_a_full_temporary_disk_is_called_a_full_disk(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def writelines(self, blocks):
            raise OSError(28, "No space left on device")

    path = write_keras(tmp_path / "a.keras", compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    line = refused(path)
    assert "No space left on device. Free disk space, or set TMPDIR" in line
    assert "damaged" not in line


def quantized(kernel, scale):
    return TENSORS | {
        "layers/int8/vars/0": np.full((3, 2), kernel, "int8"),
        "layers/int8/vars/1": np.full(2, scale, "float32"),
    }


@pytest.mark.parametrize("ending", WRITERS)
def test_quantized_files_are_refused_by_the_name_of_the_variable(tmp_path, ending):
    paths = [WRITERS[ending](tmp_path / f"{n}{ending}", quantized(n, 1.0 + n)) for n in range(2)]
    output = tmp_path / "out.weights.h5"
    with pytest.raises(InputError, match="'layers/int8/vars/0' is quantized to int8.*`quantize`"):
        average_files(paths, output)
    assert not output.exists()


def test_files_with_equal_integers_are_averaged(tmp_path):
    paths = [write_hdf5(tmp_path / f"{n}.weights.h5", quantized(1, 1.0 + n)) for n in range(2)]
    average_files(paths, tmp_path / "out.weights.h5")
    with open_weights(tmp_path / "out.weights.h5") as weights:
        np.testing.assert_array_equal(weights.variables["layers/int8/vars/1"].read(), 1.5)
