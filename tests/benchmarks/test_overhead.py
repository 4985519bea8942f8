import json
import pathlib
import subprocess

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


def test_several_processes_are_summed_up_by_median_and_range(
    overhead, monkeypatch, tmp_path, capsys
):
    commands = []

    def run(command, **_):
        # In the n-th process averaging takes n tenths of a step, and of a first call n times that.
        commands.append(command)
        n = len(commands)
        steps = {"bare": [1.0, 1.0], "PolyakModel": [1 + n / 10] * 2, "floor": [0.25] * 2}
        first = {"bare": 2.0, "PolyakModel": 2.0 + 2 * n, "floor": 0.0}
        times = {
            "tiny": {name: {"first": first[name], "steps": own} for name, own in steps.items()}
        }
        path = command[len(command) - command[::-1].index("--json")]
        pathlib.Path(path).write_text(json.dumps(times))

    monkeypatch.setattr(subprocess, "run", run)
    plot = tmp_path / "processes.png"
    chosen = ["--models", "tiny", "--variants", "PolyakModel", "--processes", "3"]
    overhead.main([*chosen, "--seed", "5", "--plot", str(plot)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].split() == ["tiny", "PolyakModel", "1.200", "1.100", "1.300", "3.00"]
    assert printed[-1].split() == ["tiny", "floor", "(0.250)", "(0.250)", "(0.250)"]
    assert plot.stat().st_size > 0
    # What a process of its own is told, it takes as told: one process, and a seed of its own.
    for n, command in enumerate(commands):
        options = overhead.parse(command[2:])
        assert (options.processes, options.seed, options.models) == (1, 5 + n, ["tiny"])
        assert options.plot != str(plot)
