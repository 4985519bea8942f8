import itertools
import math
import os
import subprocess
import sys
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from weight_samples import CONFIG, TENSORS, WRITERS, write_hdf5, write_keras

import polyak_model
from polyak_model.checkpoints import average_files
from polyak_model.errors import InputError
from polyak_model.weight_files.reader import open_weights

DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Outlives the examples of one hypothesis test."""
    return tmp_path_factory.mktemp("examples")


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def average_arrays(folder, arrays, weights=None):
    paths = [
        write_hdf5(folder / f"{n}.weights.h5", {"vars/0": array}) for n, array in enumerate(arrays)
    ]
    average_files(paths, folder / "average.weights.h5", weights)
    return read(folder / "average.weights.h5")["vars/0"]


def read(path):
    with open_weights(path) as weights:
        return {name: variable.read() for name, variable in weights.variables.items()}


floats = st.floats(allow_nan=False, allow_infinity=False)
halves = st.floats(-60000, 60000, width=16)
finite = st.sampled_from(DTYPES).flatmap(
    lambda name: npst.arrays(
        "float64" if name == "float64" else "float32",
        st.integers(1, 9),
        elements=floats if name == "float64" else halves,
    ).map(lambda array: array.astype(dtype_of(name)))
)
relative_weights = st.lists(st.floats(0, 1e300, exclude_min=True), min_size=2, max_size=5)


@settings(max_examples=60)
@given(finite, relative_weights)
def test_the_average_of_copies_is_the_original_bit_for_bit(folder, array, weights):
    average = average_arrays(folder, [array] * len(weights), weights)
    assert average.dtype == array.dtype
    assert average.tobytes() == array.tobytes()


@settings(max_examples=60)
@given(st.sampled_from(DTYPES), st.integers(2, 6), st.integers(0, 2**32 - 1), st.data())
def test_the_average_is_the_weighted_sum_rounded_once(folder, dtype, count, seed, data):
    generator = np.random.default_rng(seed)
    scale = 10.0 ** generator.integers(-3, 4)
    arrays = [(generator.normal(size=7) * scale).astype(dtype_of(dtype)) for _ in range(count)]
    weights = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    average = average_arrays(folder, arrays, weights)
    total = math.fsum(weights)
    for i in range(7):
        terms = [float(array[i]) * weight for array, weight in zip(arrays, weights, strict=True)]
        exact = math.fsum(terms) / total
        rounding = 8 * count * 2**-53 * max(abs(float(array[i])) for array in arrays)
        bounds = np.array([exact - rounding, exact + rounding]).astype(dtype_of(dtype))
        assert bounds[0] <= average[i] <= bounds[1]


@settings(max_examples=40)
@given(npst.arrays("float64", st.tuples(st.integers(2, 4), st.integers(1, 5)), elements=floats))
def test_the_average_lies_between_the_smallest_and_the_largest(folder, arrays):
    average = average_arrays(folder, arrays)
    assert (np.min(arrays, axis=0) <= average).all()
    assert (average <= np.max(arrays, axis=0)).all()


def test_the_order_of_the_files_changes_a_uniform_average_by_rounding_only(tmp_path):
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=1000) for _ in range(4)]
    averages = [average_arrays(tmp_path, order) for order in itertools.permutations(arrays)]
    largest = np.abs(arrays).max(axis=0)
    assert (np.ptp(averages, axis=0) <= 8 * 2**-53 * largest).all()


def test_the_average_of_averages_is_the_average_of_all(tmp_path):
    generator = np.random.default_rng(0)
    arrays = [generator.integers(-8, 8, 100).astype("float32") for _ in range(4)]
    halves = [average_arrays(tmp_path, arrays[:2]), average_arrays(tmp_path, arrays[2:])]
    np.testing.assert_array_equal(
        average_arrays(tmp_path, halves), average_arrays(tmp_path, arrays)
    )


def test_a_tensor_of_many_parts_is_averaged_everywhere(tmp_path):
    arrays = [np.arange(300_000, dtype="float32").reshape(3, 100_000) * n for n in (1, 3)]
    np.testing.assert_array_equal(average_arrays(tmp_path, arrays), arrays[0] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (1, 1)])
def test_scalars_and_empty_tensors_are_averaged(tmp_path, dtype, shape):
    arrays = [np.full(shape, n, dtype_of(dtype)) for n in (1, 4, 4)]
    average = average_arrays(tmp_path, arrays)
    assert (average.shape, average.dtype) == (shape, arrays[0].dtype)
    assert (average == 3).all()


@pytest.mark.parametrize("options", [{"chunks": (7, 2)}, {"compression": "gzip"}])
def test_tensors_in_chunks_are_averaged(tmp_path, options):
    tensors = [{"vars/0": np.full((700, 300), n, "float32")} for n in (1, 2)]
    paths = [write_hdf5(tmp_path / f"{n}.weights.h5", t, **options) for n, t in enumerate(tensors)]
    average_files(paths, tmp_path / "average.weights.h5")
    np.testing.assert_array_equal(read(tmp_path / "average.weights.h5")["vars/0"], 1.5)


@pytest.mark.processes
@pytest.mark.parametrize("ending", WRITERS)
def test_too_many_open_files_are_reported_with_a_remedy(tmp_path, ending):
    paths = [str(WRITERS[ending](tmp_path / f"{n}{ending}")) for n in range(40)]
    program = f"""
import resource
from polyak_model.checkpoints import average_files
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
try:
    average_files({paths}, 'average.weights.h5')
except ValueError as error:
    print(error)
"""
    assert "Raise the limit with ulimit -n" in run(program, tmp_path).stdout
    assert not (tmp_path / "average.weights.h5").exists()


@pytest.mark.parametrize("ending", WRITERS)
def test_integers_are_those_of_the_last_file_and_the_optimizer_is_left_out(tmp_path, ending):
    tensors = [
        {
            "layers/dense/vars/0": np.full(3, n, "float32"),
            "layers/dropout/seed_generator/vars/0": np.array([n, n], "uint32"),
            "layers/gate/vars/0": np.array([n == 2, True]),
            "optimizer/vars/0": np.int64(n),
            "optimizer/vars/1": np.full(3, n, "float32"),
        }
        for n in (0, 2)
    ]
    tensors[0].pop("optimizer/vars/1")
    paths = [WRITERS[ending](tmp_path / f"{n}{ending}", t) for n, t in enumerate(tensors)]
    result = average_files(paths, tmp_path / "average.weights.h5")
    assert result.averaged == ["layers/dense/vars/0"]
    assert result.copied == ["layers/dropout/seed_generator/vars/0", "layers/gate/vars/0"]
    assert result.shares == [0.5, 0.5]
    average = read(tmp_path / "average.weights.h5")
    assert average.keys() == {*result.averaged, *result.copied}
    np.testing.assert_array_equal(average["layers/dense/vars/0"], [1, 1, 1])
    for name in result.copied:
        np.testing.assert_array_equal(average[name], tensors[1][name], strict=True)


def test_files_of_different_kinds_are_averaged(tmp_path):
    paths = [writer(tmp_path / f"a{ending}") for ending, writer in WRITERS.items()]
    average_files(paths, tmp_path / "average.weights.h5")
    for name, array in read(tmp_path / "average.weights.h5").items():
        assert array.tobytes() == TENSORS[name].tobytes()


def test_groups_and_attributes_are_kept(tmp_path):
    paths = [write_hdf5(tmp_path / f"{n}.weights.h5") for n in range(2)]
    for path in paths:
        with h5py.File(path, "a") as file:
            file.create_group("layers/flatten/vars").attrs["name"] = "flatten"
            file.attrs["texts"] = ["a", "b"]
    average_files(paths, tmp_path / "average.weights.h5")
    with open_weights(paths[1]) as last, open_weights(tmp_path / "average.weights.h5") as average:
        kept = {n: a for n, a in last.attributes.items() if not n.startswith("optimizer")}
        assert list(average.attributes.pop("")["texts"]) == list(kept.pop("")["texts"])
        assert average.attributes == kept


def test_a_keras_file_keeps_configuration_metadata_and_assets_of_the_last(tmp_path):
    paths = [
        write_keras(
            tmp_path / f"{n}.keras",
            config=CONFIG | {"number": n},
            **{"assets/layers/lookup/vocabulary.txt": b"word %d" % n},
        )
        for n in range(2)
    ]
    average_files(paths, tmp_path / "average.keras")
    with open_weights(tmp_path / "average.keras") as average:
        assert average.config == CONFIG | {"number": 1, "compile_config": None}
        assert average.archive.read("assets/layers/lookup/vocabulary.txt") == b"word 1"
        assert len(average.archive.namelist()) == 4
        assert all(i.compress_type == zipfile.ZIP_STORED for i in average.archive.infolist())


def check_refused(paths, output, problem, weights=None):
    before = output.read_bytes() if output.is_file() else None
    names = sorted(os.listdir(output.parent)) if output.parent.is_dir() else None
    with pytest.raises(InputError) as caught:
        average_files(paths, output, weights)
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()
    assert (output.read_bytes() if output.is_file() else None) == before
    assert names == (sorted(os.listdir(output.parent)) if output.parent.is_dir() else None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exists", [False, True])
def test_inf_and_nan_leave_the_output_unchanged(tmp_path, value, dtype, exists):
    arrays = [np.ones(70_000).astype(dtype_of(dtype)) for _ in range(3)]
    arrays[1][69_999] = value
    paths = [
        write_hdf5(tmp_path / f"{n}.weights.h5", {"vars/0": array})
        for n, array in enumerate(arrays)
    ]
    output = tmp_path / "average.weights.h5"
    if exists:
        output.write_text("kept")
    for weights in (None, [1, 0, 1]):
        check_refused(paths, output, "1.weights.h5': 'vars/0' contains inf or NaN", weights)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ([1], "1 weights for 2 files"),
        ([1, -1], "Received: -1"),
        ([1, math.nan], "Received: nan"),
        ([1, math.inf], "Received: inf"),
        ([1, "2"], "Received: '2'"),
        ([1, True], "Received: True"),
        ([0, 0], "Received: only 0"),
    ],
)
def test_invalid_weights_are_refused(tmp_path, weights, problem):
    paths = [write_hdf5(tmp_path / f"{n}.weights.h5") for n in range(2)]
    check_refused(paths, tmp_path / "average.weights.h5", problem, weights)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_files_are_refused(tmp_path, count):
    paths = [write_hdf5(tmp_path / "0.weights.h5")][:count]
    check_refused(paths, tmp_path / "average.weights.h5", "at least two files")


@pytest.mark.processes
def test_a_full_disk_leaves_the_output_unchanged(tmp_path):
    paths = [
        WRITERS[ending](tmp_path / f"{n}{ending}", {"vars/0": np.ones(10**5)})
        for ending in (".weights.h5", ".keras")
        for n in range(2)
    ]
    program = f"""
import resource, signal, sys
from polyak_model.checkpoints import average_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 10_000, 500_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for start, ending in ((0, '.weights.h5'), (2, '.keras')):
        try:
            average_files({list(map(str, paths))}[start:start + 2], 'average' + ending)
        except ValueError as error:
            sys.stderr.write(str(error) + chr(10))
"""
    before = sorted(os.listdir(tmp_path))
    lines = run(program, tmp_path).stderr.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("Cannot write 'average.") for line in lines)
    assert sorted(os.listdir(tmp_path)) == before


def run(program, folder):
    root = os.path.dirname(os.path.dirname(polyak_model.__file__))
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.memory
def test_little_memory_is_kept_for_each_of_many_files(tmp_path):
    tensors = {f"layers/dense_{n}/vars/0": np.ones(2, "float32") for n in range(100)}
    paths = [str(write_hdf5(tmp_path / f"{n}.weights.h5", tensors)) for n in range(40)]
    program = f"""
import re
from polyak_model.checkpoints import average_files
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
average_files({paths[:2]}, 'average.weights.h5')
before = peak()
average_files({paths}, 'average.weights.h5')
print((peak() - before) / 38)
"""
    kilobytes_for_each = float(run(program, tmp_path).stdout)
    assert kilobytes_for_each < 500


@pytest.mark.memory
def test_memory_does_not_grow_with_the_files_nor_with_the_tensor(tmp_path):
    array = np.random.default_rng(0).random(2**23, "float32")
    paths = [write_hdf5(tmp_path / f"{n}.weights.h5", {"vars/0": array}) for n in range(6)]
    program = f"""
import tracemalloc
from polyak_model.checkpoints import average_files
paths = {list(map(str, paths))}
average_files(paths[:2], 'average.weights.h5')
tracemalloc.start()
average_files(paths, 'average.weights.h5')
print(tracemalloc.get_traced_memory()[1])
"""
    assert int(run(program, tmp_path).stdout) < 20 * 2**20 < array.nbytes


def test_progress_is_reported_up_to_the_end(tmp_path):
    array = np.zeros(600_000, "float32")
    paths = [
        write_hdf5(tmp_path / f"{n}.weights.h5", {"vars/0": array, "vars/1": np.ones(2, "int8")})
        for n in range(2)
    ]
    told = []
    average_files(paths, tmp_path / "average.weights.h5", progress=told.append)
    assert told == sorted(told)
    assert len(told) > 2
    assert told[-1] == 1


@pytest.mark.processes
def test_the_benchmark_runs(tmp_path):
    script = os.path.join(os.path.dirname(os.path.dirname(__file__)), "benchmarks")
    program = f"""
import sys
sys.path.insert(0, {script!r})
sys.argv[1:] = "--files 2 --megabytes 1 --tensors 2 --repeats 1".split()
import averaging_files
averaging_files.main()
"""
    lines = run(program, tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("average_files")] == [
        "average_files"
    ] * 2
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_polyak_model_is_refused_for_it_holds_two_models(tmp_path):
    pair = [make_wrapper(tmp_path / name) for name in ("a.weights.h5", "b.weights.h5")]
    with pytest.raises(InputError, match="it is the file of a PolyakModel.* polyak-model extract"):
        average_files(pair, tmp_path / "out.weights.h5")
    assert not (tmp_path / "out.weights.h5").exists()


def make_wrapper(path):
    groups = ("averages/average/layers/dense", "raw_model/layers/dense", "shadow")
    return write_hdf5(path, {f"{group}/vars/0": np.zeros(2) for group in groups})
