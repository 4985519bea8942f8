import pathlib

import pytest

pytestmark = pytest.mark.benchmarks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_of_snapshots_prints_their_number_and_their_time(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import snapshots

    results = snapshots.main(["--epochs", "1"])
    assert 16 <= results["files"] <= 33
    # One epoch takes almost as many snapshots as several.
    assert 0 < results["spent"] < results["total"] / 2
    share = 100 * results["spent"] / results["total"]
    assert f"{results['files']} files, " in (printed := capsys.readouterr().out)
    assert f"{share:.2f} % of the training" in printed
