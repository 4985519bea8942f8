import json
import pathlib

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.benchmarks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def inference(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import inference

    return inference


class Counting(keras.layers.Layer):
    traces = 0

    def call(self, inputs):
        Counting.traces += 1
        return inputs


def make_counting():
    return keras.Sequential([keras.Input((6,)), Counting(), keras.layers.Dense(10)])


@pytest.mark.tensorflow
def test_the_benchmark_of_inference_asks_who_it_says_and_switching_routes_traces_nothing(inference):
    groups = inference.prepare(make_counting, batches=2, batch_size=4, jit=False)
    before = Counting.traces
    predicted = {name: call() for name, (_, call) in groups["predict"].items()}
    evaluated = {name: call() for name, (_, call) in groups["evaluate"].items()}
    # Three plain models and average, raw and both, each in two ways; and both in one pass. Some
    # are traced twice, since Keras creates metrics in the first trace.
    assert Counting.traces - before >= 2 * (3 + 1 + 1 + 2) + 2
    traced = Counting.traces
    again = groups["predict"]["Keras use_ema"][1]()
    # Keras swaps by sums and differences, which round.
    np.testing.assert_allclose(again, predicted["Keras use_ema"], rtol=0, atol=1e-5)
    for name, group in (("average", "switch to average"), ("raw", "switch to raw")):
        for before, call in groups[group].values():
            before()
            np.testing.assert_array_equal(call(), predicted[name])
    for _, call in reversed(groups["evaluate"].values()):
        call()
    assert Counting.traces == traced

    np.testing.assert_array_equal(predicted["bare again"], predicted["bare"])
    np.testing.assert_array_equal(predicted["raw"], predicted["bare"])
    distance = np.abs(predicted["average"] - predicted["raw"]).max()
    assert distance > 1e-2
    mean = (predicted["average"] + predicted["raw"]) / 2
    np.testing.assert_allclose(predicted["ensemble"], mean, rtol=0, atol=1e-6)
    # Not debiased, the average of Keras is nearer to the first iterate.
    assert np.abs(predicted["Keras use_ema"] - predicted["raw"]).max() > distance
    in_turn = dict(zip(inference.ROUTES, evaluated["three routes in turn"], strict=True))
    for route, prefix in {"average": "", "raw": "raw_", "ensemble": "ensemble_"}.items():
        for name, value in in_turn[route].items():
            assert evaluated[route][name] == value
            one_pass = evaluated["three routes, one pass"][prefix + name]
            assert one_pass == pytest.approx(value, rel=1e-6)


@pytest.mark.tensorflow
def test_all_calls_alternate_in_an_order_shuffled_in_every_round(inference):
    log = []
    names = ["bare", "average", "raw after raw", "raw after average"]
    calls = {name: lambda name=name: log.append(name) for name in [*names, "before"]}
    groups = {
        "predict": {name: (None, calls[name]) for name in names[:2]},
        "switch to raw": {name: (calls["before"], calls[name]) for name in names[2:]},
    }
    times = inference.measure(groups, rounds=20, seed=0)
    assert log[:4] == names
    ahead = [log[i - 1] for i, name in enumerate(log) if i >= 4 and name in names[2:]]
    assert ahead == ["before"] * 40
    turns = [name for name in log[4:] if name != "before"]
    rounds = [turns[i : i + 4] for i in range(0, 80, 4)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len(set(map(tuple, rounds))) > 10
    assert all(
        len(each) == 20 for own in times.values() for c in own.values() for each in c.values()
    )
    first = log.copy()
    log.clear()
    inference.measure(groups, rounds=20, seed=0)
    assert log == first


def test_the_script_prints_writes_and_plots_the_times_of_a_tiny_model(inference, tmp_path, capsys):
    written, plot = tmp_path / "times.json", tmp_path / "inference.png"
    sizes = ["--models", "tiny", "--rounds", "3", "--batches", "1", "--batch-size", "4"]
    times = inference.main([*sizes, "--json", str(written), "--plot", str(plot)])
    assert json.loads(written.read_text()) == times
    assert plot.stat().st_size > 0
    printed = capsys.readouterr().out
    for calls in times["tiny"].values():
        for name, own in calls.items():
            assert name in printed
            assert len(own["clock"]) == len(own["processor"]) == 3
            assert min(own["clock"]) > 0


@pytest.mark.tensorflow
def test_a_ratio_is_the_median_of_paired_ratios(inference):
    assert inference.ratio([2.0, 11.0, 9.0], [1.0, 10.0, 3.0]) == (2.0, (3.0 - 1.1) / 2)
