import json
import math
import os
import pathlib
import subprocess
import sys

import h5py
import ml_dtypes
import numpy as np
import pytest
from snapshot_samples import KERNEL, MEAN, PAIR, SEED, STEPS, average, make_walk, write_run
from weight_samples import write_keras

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage
from polyak_model.errors import InputError
from polyak_model.snapshots import rebuild
from polyak_model.snapshots.folder import snapshot_name
from polyak_model.weight_files.reader import open_weights

width = PowerAverage.from_relative_width
WALK = make_walk()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "snapshots"
    write_run(path)
    return path


def read(path):
    with open_weights(path) as weights:
        return {name: variable.read() for name, variable in weights.variables.items()}


def measure(rebuilt, path, walk=WALK):
    """The error of the rebuilt kernel, relative to its true distance from the raw weights."""
    true = average(rebuilt.rule, walk, rebuilt.step)
    distance = np.linalg.norm(true - walk[rebuilt.step])
    return np.linalg.norm(read(path)[KERNEL] - true) / distance


@pytest.mark.parametrize(
    "rule",
    [
        width(0.05),
        width(0.1),
        width(0.25),
        ExponentialAverage.from_half_life(40),
        ExponentialAverage(0.99, debias=False),
        ExponentialAverage(0.99, warmup=True),
        UniformAverage(start_step=600),
        PolynomialAverage(8),
    ],
    ids=repr,
)
@pytest.mark.parametrize("step", [800, 600])
def test_the_measured_error_is_about_the_one_told(folder, tmp_path, rule, step):
    if rule == UniformAverage(start_step=600) and step == 600:
        rule = UniformAverage(start_step=450)
    rebuilt = rebuild(folder, rule, tmp_path / "out.weights.h5", step=step, max_error=0.1)
    assert rebuilt.step == step
    assert measure(rebuilt, tmp_path / "out.weights.h5") < 3 * rebuilt.walk_error
    assert math.fsum(rebuilt.coefficients.values()) == pytest.approx(1, abs=1e-14)
    assert max(used for used, _ in rebuilt.coefficients) <= step


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("step", [50, 400, 800])
def test_a_stored_average_comes_back_to_rounding(folder, tmp_path, name, step):
    rebuilt = rebuild(folder, PAIR[name], tmp_path / "out.weights.h5", step=step)
    expected = read(folder / snapshot_name(step))[f"averages/{name}/{KERNEL}"]
    np.testing.assert_allclose(read(tmp_path / "out.weights.h5")[KERNEL], expected, rtol=3e-7)
    assert rebuilt.walk_error < 1e-12


def test_what_is_not_averaged_is_that_of_the_last_snapshot(folder, tmp_path):
    rebuild(folder, width(0.1), tmp_path / "out.weights.h5", step=620, max_error=1)
    arrays = read(tmp_path / "out.weights.h5")
    np.testing.assert_array_equal(arrays[MEAN], np.full(2, 600, "float32"))
    np.testing.assert_array_equal(arrays[SEED], np.array([600, 1], "uint32"))
    assert arrays.keys() == {KERNEL, MEAN, SEED}


def test_the_batch_normalization_layers_to_refresh_are_named(folder, tmp_path):
    rebuilt = rebuild(folder, width(0.1), tmp_path / "out.weights.h5")
    assert rebuilt.statistics == ["layers/batch_normalization"]


def test_without_an_output_nothing_is_written_and_the_errors_are_the_same(folder, tmp_path):
    before = sorted(folder.iterdir())
    alone = rebuild(folder, width(0.1))
    written = rebuild(folder, width(0.1), tmp_path / "out.weights.h5")
    assert alone.coefficients == written.coefficients
    assert alone.snapshots == len(STEPS)
    assert alone.rounding == pytest.approx(np.abs(list(alone.coefficients.values())).sum())
    assert sorted(folder.iterdir()) == before


TENSORS = {KERNEL: np.zeros((3, 2)), MEAN: np.zeros(2), SEED: np.zeros(2, "uint32")}


def cast(dtype, **changes):
    arrays = {**TENSORS, **changes}
    return {name: a if a.dtype == "uint32" else a.astype(dtype) for name, a in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "float64"])
def test_the_architecture_gives_the_config_and_the_dtypes(folder, tmp_path, dtype):
    like = write_keras(tmp_path / "like.keras", cast(dtype))
    rebuild(folder, width(0.1), tmp_path / "out.keras", like)
    rebuild(folder, width(0.1), tmp_path / "out.weights.h5")
    arrays = read(tmp_path / "out.keras")
    with open_weights(tmp_path / "out.keras") as written, open_weights(like) as pattern:
        assert written.config == {**pattern.config, "compile_config": None}
    assert arrays[KERNEL].dtype == arrays[MEAN].dtype == dtype
    single = read(tmp_path / "out.weights.h5")[KERNEL]
    np.testing.assert_allclose(arrays[KERNEL].astype("float64"), single, rtol=2**-8)


def test_weights_alone_have_the_dtypes_of_the_model(tmp_path):
    write_run(tmp_path / "halves", dtype="bfloat16")
    rebuild(tmp_path / "halves", width(0.1), tmp_path / "out.weights.h5")
    assert read(tmp_path / "out.weights.h5")[KERNEL].dtype == ml_dtypes.bfloat16


def test_groups_keep_the_names_of_their_layers(folder, tmp_path):
    rebuild(folder, width(0.1), tmp_path / "out.weights.h5")
    with h5py.File(tmp_path / "out.weights.h5") as file:
        assert file["layers/dense/vars"].attrs["name"] == "dense"


def test_snapshots_of_version_0_2_0_are_rebuilt_as_those_of_today(tmp_path):
    write_run(tmp_path / "today", steps=(50, 100, 150, 200))
    before = pathlib.Path(__file__).parents[1] / "formats" / "snapshots-1"
    for folder, output in ((before, "before"), (tmp_path / "today", "after")):
        rebuild(folder, width(0.2), tmp_path / f"{output}.weights.h5", max_error=0.2)
    expected, received = (read(tmp_path / f"{n}.weights.h5") for n in ("before", "after"))
    assert expected.keys() == received.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(received[name], array)
    with h5py.File(tmp_path / "before.weights.h5") as file:
        assert file["layers/dense/vars"].attrs["name"] == "dense"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({KERNEL: np.zeros((2, 3))}, "has the shapes"),
        ({"layers/dense/vars/1": np.zeros(2)}, "'layers/dense/vars/1' is only there"),
    ],
)
def test_another_architecture_is_refused(folder, tmp_path, changes, problem):
    like = write_keras(tmp_path / "like.keras", cast("float32", **changes))
    with pytest.raises(InputError, match=f"of another architecture than the snapshots.*{problem}"):
        rebuild(folder, width(0.1), tmp_path / "out.keras", like)
    assert not (tmp_path / "out.keras").exists()


def test_an_average_that_is_too_far_is_refused_with_the_nearest_and_what_it_takes(folder, tmp_path):
    with pytest.raises(InputError) as refused:
        rebuild(folder, width(0.012), tmp_path / "out.weights.h5")
    message = str(refused.value)
    assert "% of its distance from the raw weights, more than 5 %, with 16 snapshots" in message
    assert "The nearest that can be rebuilt has relative width 0.01" in message
    assert "It would take about 32 snapshots" in message
    assert not (tmp_path / "out.weights.h5").exists()
    assert rebuild(folder, width(0.012), max_error=10).walk_error > 0.05


def test_a_step_between_snapshots_names_the_one_before(folder):
    with pytest.raises(InputError, match="at step 649.*The last snapshot before is of step 600"):
        rebuild(folder, width(0.01), step=649)


@pytest.mark.parametrize("step", [49, 801, 10**9])
def test_a_step_without_snapshots_is_refused(folder, step):
    with pytest.raises(InputError, match="must be from 50, the step of the first snapshot, to 800"):
        rebuild(folder, width(0.1), step=step)


def test_files_of_another_run_are_refused(tmp_path):
    write_run(tmp_path / "runs", steps=(100, 200))
    write_run(tmp_path / "runs", steps=(300,), run="b")
    with pytest.raises(InputError, match=r"'snapshot-0000000300.* are of different runs"):
        rebuild(tmp_path / "runs", width(0.1))


def test_different_rules_are_refused(tmp_path):
    write_run(tmp_path / "rules", {"average": width(0.1)}, (100, 200))
    write_run(tmp_path / "rules", {"average": width(0.2)}, (300,), sequence=9)
    with pytest.raises(InputError, match="the rules differ: average=PowerAverage"):
        rebuild(tmp_path / "rules", width(0.1))


def test_after_a_restart_only_what_follows_counts(tmp_path):
    write_run(tmp_path / "all", walk=make_walk(seed=1), run="a")
    write_run(tmp_path / "all", steps=range(40, 321, 40), period=1, sequence=100, iterations=1120)
    write_run(tmp_path / "later", steps=range(40, 321, 40))
    received = rebuild(tmp_path / "all", width(0.1))
    assert received.coefficients == rebuild(tmp_path / "later", width(0.1)).coefficients
    # Two files of the same steps were replaced.
    assert received.notes == [
        "15 of 23 snapshots do not count: averaging was restarted after them."
    ]


def test_snapshots_of_a_future_that_was_abandoned_do_not_count(tmp_path):
    write_run(tmp_path / "back")
    write_run(tmp_path / "back", steps=(640,), sequence=100)
    received = rebuild(tmp_path / "back", width(0.1))
    assert max(step for step, _ in received.coefficients) == 640
    assert received.notes == [
        "4 of 17 snapshots do not count: training went back to an earlier step than 640."
    ]


def test_a_single_average_works_less_exactly_and_says_so(tmp_path):
    write_run(tmp_path / "single", {"average": width(0.05)})
    received = rebuild(tmp_path / "single", width(0.15), tmp_path / "out.weights.h5")
    assert received.notes[0].startswith("The snapshots are of a single average.")
    assert measure(received, tmp_path / "out.weights.h5") < 3 * received.walk_error


def test_a_folder_without_snapshots_is_refused(tmp_path):
    (tmp_path / "epoch-1.weights.h5").touch()
    with pytest.raises(InputError, match="it contains no snapshots. Name the folder of"):
        rebuild(tmp_path, width(0.1))
    with pytest.raises(InputError, match="No such file or directory"):
        rebuild(tmp_path / "missing", width(0.1))


def test_damaged_files_are_refused(tmp_path):
    write_run(tmp_path / "damaged", steps=(100, 200))
    path = tmp_path / "damaged" / snapshot_name(200)
    whole = path.read_bytes()
    for contents in (b"", whole[: len(whole) // 2], b"\0" * 100):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=f"Cannot use '{path}'"):
            rebuild(tmp_path / "damaged", width(0.1))


def rewrite(path, change):
    with h5py.File(path, "a") as file:
        record = json.loads(file["record"][()].tobytes())
        change(record)
        del file["record"]
        file["record"] = np.frombuffer(json.dumps(record).encode(), "uint8")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.pop("run"), "its record is damaged at 'run'"),
        (lambda r: r.update(step=-1), "its record is damaged at 'step'"),
        (lambda r: r.update(averages={}), "its record is damaged at 'averages'"),
        (lambda r: r.update(averages={"a": 1}), "its record is damaged at 'averages'"),
        (lambda r: r.update(format=3, version="9.0"), "polyak_model 9.0 wrote it in format 3"),
        (lambda r: r.pop("groups"), "its record is damaged at 'groups'"),
        (lambda r: r.update(groups={"a": 1}), "its record is damaged at 'groups'"),
        (lambda r: r.update(groups={"a": {"name": {}}}), "its record is damaged at 'groups'"),
        (lambda r: r.update(groups={"a": {"name": [[]]}}), "its record is damaged at 'groups'"),
        (
            lambda r: r["averages"]["short"]["rule"].update(class_name="Other"),
            "its rule is of the unknown class 'Other'",
        ),
        (
            lambda r: r["averages"]["short"]["rule"].update(config={"gamma": -1}),
            "its rule is invalid",
        ),
        (
            lambda r: r["averages"]["short"]["rule"].update(config={"width": 1}),
            "its rule is invalid",
        ),
        (lambda r: r["averages"]["long"].update(dtypes={}), "its record has no dtype"),
    ],
)
def test_damaged_records_are_refused(tmp_path, change, problem):
    write_run(tmp_path / "damaged", steps=(100, 200))
    rewrite(tmp_path / "damaged" / snapshot_name(200), change)
    with pytest.raises(InputError, match=problem):
        rebuild(tmp_path / "damaged", width(0.2), tmp_path / "out.weights.h5", max_error=9)


def test_other_weights_in_one_of_the_files_are_refused(tmp_path):
    write_run(tmp_path / "mixed", steps=(100, 200))
    with h5py.File(tmp_path / "mixed" / snapshot_name(100), "a") as file:
        del file[f"averages/short/{KERNEL}"]
    with pytest.raises(InputError, match=f"'{KERNEL}' is in"):
        rebuild(tmp_path / "mixed", width(0.1), tmp_path / "out.weights.h5", max_error=9)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"output": "out.keras"}, "snapshots contain no architecture"),
        ({"output": "out.h5"}, "its name must end in"),
        ({"like": "model.weights.h5"}, "`like` must be a .keras file of the architecture"),
    ],
)
def test_wrong_arguments_are_refused(folder, tmp_path, monkeypatch, arguments, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=problem):
        rebuild(folder, width(0.1), **arguments)
    with pytest.raises(ValueError, match="`rule` must be a rule such as"):
        rebuild(folder, 0.9)
    with pytest.raises(ValueError, match="`max_error` must be a number of at least 0"):
        rebuild(folder, width(0.1), max_error=-1)


def test_rules_of_ones_own_are_read_if_their_class_is_defined(tmp_path):
    class Lately(PowerAverage):
        """A rule of another module."""

    write_run(tmp_path / "own", {"average": Lately(5.0)})
    assert rebuild(tmp_path / "own", Lately(5.0)).walk_error < 1e-12


def test_neither_keras_nor_tensorflow_is_imported(folder):
    script = (
        "import sys; from polyak_model import PowerAverage, snapshots; "
        f"snapshots.rebuild({str(folder)!r}, PowerAverage(5.0)); "
        "assert not {'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
