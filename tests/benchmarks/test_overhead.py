import json
import pathlib

import pytest

pytestmark = pytest.mark.benchmarks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead

    return overhead


def test_the_benchmark_of_overhead_times_all_variants_in_turns(
    overhead, monkeypatch, tmp_path, capsys
):
    import training_steps

    turns = []
    monkeypatch.setattr(
        training_steps, "timed", lambda step: turns.append(step) or (step(), 2e-3)[1]
    )
    path, plot = tmp_path / "times.json", tmp_path / "times.png"
    chosen = ["--models", "tiny", "--variants", "PolyakModel", "Keras use_ema", "host callback"]
    written = ["--json", str(path), "--plot", str(plot)]
    k = ["--steps-per-execution", "2"]
    times = overhead.main([*chosen, *k, "--rounds", "6", *written])["tiny"]
    assert list(times) == ["bare", "PolyakModel", "Keras use_ema", "host callback", "floor"]
    rounds = [turns[i : i + 5] for i in range(0, len(turns), 5)]
    assert len(rounds) == 2 + 6
    assert all(set(own) == set(rounds[0]) and len(own) == 5 for own in rounds)
    # A step of two of the training; the floor is one by itself.
    assert times.pop("floor")["steps"] == [2e-3] * 6
    assert all(own == {"first": 2e-3, "steps": [1e-3] * 6} for own in times.values())
    assert json.loads(path.read_text())["tiny"].items() >= times.items()
    assert plot.stat().st_size > 0
    assert "0.00 ± 0.00" in capsys.readouterr().out


def test_the_order_of_turns_is_shuffled_in_every_round_and_follows_from_the_seed(overhead):
    from training_steps import take_turns

    def order(seed):
        called = []
        steps = {name: lambda name=name: called.append(name) for name in "abcd"}
        times = take_turns(steps, 20, seed)
        assert all(len(own["steps"]) == 20 for own in times.values())
        assert called[:8] == list("abcdabcd")
        return [tuple(called[i : i + 4]) for i in range(8, len(called), 4)]

    rounds = order(0)
    assert all(sorted(own) == list("abcd") for own in rounds)
    assert len(set(rounds)) > 10
    assert order(0) == rounds != order(1)


def test_an_execution_takes_as_many_training_steps_as_asked(overhead):
    make, batch_size = overhead.MODELS["tiny"]
    made = []
    step = overhead.prepare("bare", lambda: made.append(make()) or made[0], batch_size, False, 3)
    step()
    assert made[0].optimizer.iterations == 3


def test_extra_time_is_the_median_of_paired_differences(overhead):
    steps = {"bare": [2.0, 10.0, 3.0], "average": [2.5, 11.0, 3.25], "floor": [0.25] * 3}
    times = {name: {"first": 4.0, "steps": own} for name, own in steps.items()}
    (_, average, _) = overhead.rows("net", times)
    assert average == ["net", "average", "500.00 ± 375.00", "0.167", "2.00", "4.00", "1.00"]
    assert overhead.shares(times) == {
        "average": (0.25 / 3, 0.5 / 3, 1 / 3),
        "floor": (0.25 / 3,) * 3,
    }


def test_several_processes_are_summarized_by_median_and_range(overhead, tmp_path, capsys):
    plot = tmp_path / "processes.png"
    chosen = ["--models", "tiny", "--variants", "PolyakModel", "--rounds", "2", "--seed", "5"]
    runs = overhead.main([*chosen, "--processes", "2", "--plot", str(plot)])
    assert [list(run["tiny"]) for run in runs] == [["bare", "PolyakModel", "floor"]] * 2
    assert runs[0] != runs[1]
    assert plot.stat().st_size > 0
    *_, wrapped, floor = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert wrapped[:2] == ["tiny", "PolyakModel"]
    assert floor[:2] == ["tiny", "floor"]
    median, low, high = map(float, wrapped[2:5])
    assert low <= median <= high
