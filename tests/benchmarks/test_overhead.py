import json
import sys

import keras
import numpy as np
import overhead
import overhead_tables
import pytest
import training_steps

pytestmark = pytest.mark.benchmarks

VARIANTS = overhead.trainer.VARIANTS
PEERS = [
    name for name in VARIANTS if VARIANTS[name].build is training_steps.bare and name != "bare"
]


@pytest.mark.tensorflow
def test_the_benchmark_of_overhead_times_all_variants_in_turns(monkeypatch, tmp_path, capsys):
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


@pytest.mark.tensorflow
def test_the_order_of_turns_is_shuffled_in_every_round_and_follows_from_the_seed():
    def order(seed):
        called = []
        steps = {name: lambda name=name: called.append(name) for name in "abcd"}
        times = training_steps.take_turns(steps, 20, seed)
        assert all(len(own["steps"]) == 20 for own in times.values())
        assert called[:8] == list("abcdabcd")
        return [tuple(called[i : i + 4]) for i in range(8, len(called), 4)]

    rounds = order(0)
    assert all(sorted(own) == list("abcd") for own in rounds)
    assert len(set(rounds)) > 10
    assert order(0) == rounds != order(1)


@pytest.mark.tensorflow
def test_an_execution_takes_as_many_training_steps_as_asked():
    make, batch_size = training_steps.MODELS["tiny"]
    made = []

    def make_and_keep():
        made.append(make())
        return made[-1]

    overhead.trainer.prepare("bare", make_and_keep, batch_size, False, steps_per_execution=3)()
    assert made[0].optimizer.iterations == 3


def test_averages_callbacks_and_peers_are_timed_on_every_backend(tmp_path, capsys):
    path, plot = tmp_path / "times.json", tmp_path / "times.png"
    chosen = ["PolyakModel", "snapshots", "monitor", *PEERS]
    sizes = ["--models", "tiny", "--rounds", "3", "--variants", *chosen]
    times = overhead.main([*sizes, "--json", str(path), "--plot", str(plot)])["tiny"]
    assert times.keys() == {"bare", *chosen, "floor"}
    assert all(len(own["steps"]) == 3 and min(own["steps"]) > 0 for own in times.values())
    assert json.loads(path.read_text("utf-8")) == {"tiny": times}
    assert plot.stat().st_size > 0
    printed = capsys.readouterr().out
    assert training_steps.TITLE in printed
    assert all(f" {name} " in printed for name in times)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_averages_exponentially(name):
    model = training_steps.make_mlp(4, depth=1, inputs=3)
    callback = VARIANTS[name].callback()
    training_steps.begin_training(callback, model, 3)
    first = model.get_weights()
    second, third = ([w + change for w in first] for change in (1, -2))
    # Some begin with the first weights, some with those after the first step: the same here.
    for weights in (first, second, third):
        model.set_weights(weights)
        if training_steps.BACKEND == "jax":
            state = [weight.value for weight in model.trainable_variables]
            model._jax_state = {"trainable_variables": state}
        callback.on_train_batch_end(0)
    d = training_steps.DECAY
    for average, w in zip(callback.average, first, strict=True):
        expected = w.astype("float64") + d * (1 - d) * 1 + (1 - d) * -2
        np.testing.assert_allclose(keras.ops.convert_to_numpy(average), expected, atol=3e-7)


@pytest.mark.skipif(training_steps.BACKEND != "jax", reason="only JAX trains in threads")
def test_a_training_that_fails_in_its_thread_is_told_at_its_turn():
    turn = overhead.trainer.Turn(lambda turn: 1 / 0)
    with pytest.raises(RuntimeError, match="has failed") as error:
        turn()
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_extra_time_is_the_median_of_paired_differences():
    steps = {"bare": [2.0, 10.0, 3.0], "average": [2.5, 11.0, 3.25], "floor": [0.25] * 3}
    times = {name: {"first": 4.0, "steps": own} for name, own in steps.items()}
    (_, average, _) = overhead_tables.rows("net", times)
    assert average == ["net", "average", "500.00 ± 375.00", "0.167", "2.00", "4.00", "1.00"]
    assert overhead_tables.shares(times) == {
        "average": (0.25 / 3, 0.5 / 3, 1 / 3),
        "floor": (0.25 / 3,) * 3,
    }


def test_several_processes_are_summarized_by_median_and_range(monkeypatch, tmp_path, capsys):
    seeds = []

    def run(command, **kwargs):
        assert command[:2] == [sys.executable, overhead.__file__]
        seeds.append(overhead.parse(command[2:]).seed)
        overhead.main(command[2:])

    monkeypatch.setattr(overhead.subprocess, "run", run)
    path, plot = tmp_path / "processes.json", tmp_path / "processes.png"
    chosen = ["--models", "tiny", "--variants", "PolyakModel", "--rounds", "2", "--seed", "5"]
    written = ["--json", str(path), "--plot", str(plot)]
    runs = overhead.main([*chosen, "--processes", "2", *written])
    assert [list(run["tiny"]) for run in runs] == [["bare", "PolyakModel", "floor"]] * 2
    assert seeds == [5, 6]
    assert runs[0] != runs[1]
    assert json.loads(path.read_text("utf-8")) == runs
    assert plot.stat().st_size > 0
    *_, bare, wrapped, floor = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in (bare, wrapped, floor)] == [
        ["tiny", "bare"],
        ["tiny", "PolyakModel"],
        ["tiny", "floor"],
    ]
    median, low, high = map(float, wrapped[2:5])
    assert low <= median <= high


def test_the_rows_of_processes_have_medians_over_processes():
    runs = [
        {
            "bare": {"first": 1.0, "steps": [0.01] * 3},
            "average": {"first": 2.0 * n, "steps": [0.01 + 0.001 * n] * 3, "alone": [0.002 * n]},
            "floor": {"first": 1.0, "steps": [0.001] * 3},
        }
        for n in (1, 5, 2)
    ]
    assert [*overhead_tables.rows_of_processes("net", runs)] == [
        ["net", "bare", "(10.00 ms)", "(10.00 ms)", "(10.00 ms)"],
        ["net", "average", "1.200", "1.100", "1.500", "4.00", "4.00", "2.00", "10.00"],
        ["net", "floor", "(0.100)", "(0.100)", "(0.100)"],
    ]
