import json
import pathlib
import subprocess

import numpy as np
import pytest

pytestmark = pytest.mark.benchmarks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
MEGABYTES_100 = 10**8


@pytest.fixture
def overhead_memory(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead_memory

    return overhead_memory


def test_the_peak_of_the_resident_set_is_that_since_the_last_reset(overhead_memory):
    resident = overhead_memory.resident
    overhead_memory.reset_peaks()
    before = resident()
    assert before["resident at peak"] - before["resident at rest"] < 0.02 * MEGABYTES_100
    block = np.ones(MEGABYTES_100, "int8")
    held = resident()["resident at rest"] - before["resident at rest"]
    del block
    after = resident()
    assert held == pytest.approx(MEGABYTES_100, rel=0.02)
    assert after["resident at peak"] - before["resident at peak"] == pytest.approx(held, rel=0.02)
    overhead_memory.reset_peaks()
    assert resident()["resident at peak"] < before["resident at peak"] + 0.02 * MEGABYTES_100


def test_tensors_are_counted_where_tensorflow_counts_them(overhead_memory):
    import tensorflow as tf

    if not overhead_memory.tensors():
        pytest.skip("this version of TensorFlow does not count on the CPU")
    overhead_memory.reset_peaks()
    before = overhead_memory.tensors()
    assert before["tensors at peak"] == before["tensors at rest"]
    block = tf.fill([MEGABYTES_100 // 4], 1.5)
    held = overhead_memory.tensors()["tensors at rest"] - before["tensors at rest"]
    del block
    after = overhead_memory.tensors()
    # A chunk of the pool is taken whole where splitting it would leave little.
    assert MEGABYTES_100 <= held < 2 * MEGABYTES_100
    assert after["tensors at peak"] - before["tensors at peak"] == held
    assert after["tensors at rest"] == before["tensors at rest"]


def test_memory_is_measured_in_a_process_for_each_variant(
    overhead_memory, monkeypatch, tmp_path, capsys
):
    import overhead

    run, begun = subprocess.run, []

    def run_one_of_them(command, **options):
        settings = json.loads(command[-1])
        begun.append(settings[1])
        if begun[-1] == "PolyakModel":
            return run(command, **options)
        # Importing Keras takes most of the time of a process, so the other is measured in this one.
        measured = json.dumps(overhead_memory.measure(*settings))
        return subprocess.CompletedProcess(command, 0, stdout=measured)

    monkeypatch.setattr(subprocess, "run", run_one_of_them)
    plot = tmp_path / "memory.png"
    chosen = ["--memory", "--models", "tiny", "--variants", "PolyakModel"]
    results = overhead.main([*chosen, "--plot", str(plot)])
    assert list(results["tiny"]) == begun == ["bare", "PolyakModel"]
    bare, wrapped = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert bare[:2] == ["tiny", "bare"]
    assert wrapped[:2] == ["tiny", "PolyakModel"]
    assert plot.stat().st_size > 0


def test_a_process_measures_every_step(overhead_memory):
    found = overhead_memory.measure("tiny", "PolyakModel", False, 1)
    assert found.pop("parameters") == 4 * (784 * 16 + 16 * 10)
    assert set(found) in (set(overhead_memory.KINDS), set(overhead_memory.KINDS[2:]))
    assert all(len(own) == overhead_memory.STEPS for own in found.values())
    for kind in ("resident", *(["tensors"] if "tensors at rest" in found else [])):
        peaks, rests = found[f"{kind} at peak"], found[f"{kind} at rest"]
        assert all(peak >= rest >= 0 for peak, rest in zip(peaks, rests, strict=True))
