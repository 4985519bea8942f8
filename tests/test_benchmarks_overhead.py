import json
import pathlib

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def test_the_benchmark_of_overhead_times_all_variants_in_turns(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead

    turns = []
    monkeypatch.setattr(overhead, "timed", lambda step: turns.append(step) or (step(), 1e-3)[1])
    path = tmp_path / "times.json"
    chosen = ["--models", "tiny", "--variants", "PolyakModel", "Keras use_ema", "host callback"]
    times = overhead.main([*chosen, "--rounds", "3", "--json", str(path)])["tiny"]
    assert list(times) == ["bare", "PolyakModel", "Keras use_ema", "host callback", "floor"]
    assert all(len(own["steps"]) == 3 for own in times.values())
    assert turns == turns[:5] * 5
    assert json.loads(path.read_text())["tiny"] == times
    assert "0.00 ± 0.00" in capsys.readouterr().out


def test_extra_time_is_the_median_of_paired_differences(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead

    steps = {"bare": [2.0, 10.0, 3.0], "average": [2.5, 11.0, 3.25], "floor": [0.25] * 3}
    times = {name: {"first": 4.0, "steps": own} for name, own in steps.items()}
    (_, average, _) = overhead.rows("net", times)
    assert average == ["net", "average", "500.00 ± 375.00", "0.167", "2.00", "4.00", "1.00"]
