import pathlib

import numpy as np
import pytest

pytestmark = pytest.mark.benchmarks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_of_precision_finds_a_compensated_average_exact_and_a_plain_one_stalled(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import precision

    plot = tmp_path / "precision.png"
    sizes = ["--steps", "10000", "--decays", "0.999", "--weights", "50", "--runs", "2"]
    results = precision.main([*sizes, "--plot", str(plot)])
    moving, stopped = (results[regime, 0.999] for regime in ("keep moving", "stop after a fifth"))
    for result in (moving, stopped):
        assert set(result["errors"]) == {"float32", "compensated", "Keras use_ema"}
        assert result["steps"][-1] == 10_000
        assert result["errors"]["compensated"].max() <= 1e-7
        assert np.all(result["errors"]["float32"][-1] <= result["bound"])
    assert moving["errors"]["float32"].max() <= 2e-5
    # A stalled average stays about the bound: half a unit in the last place, over the weight.
    plain, compensated = (stopped["errors"][method][-1] for method in ("float32", "compensated"))
    assert np.all(plain >= 0.5 * stopped["bound"])
    assert np.all(plain >= 100 * compensated)
    assert plot.stat().st_size > 0
    printed = capsys.readouterr().out
    assert printed.count("\nkeep moving") == printed.count("\nstop after a fifth") == 3
