import pathlib

import numpy as np
import pytest

pytestmark = pytest.mark.benchmarks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def overhead_growth(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead_growth

    return overhead_growth


def test_the_slope_and_its_standard_error_are_those_of_least_squares(overhead_growth):
    from scipy import stats

    sizes = np.array([8, 30, 100, 300, 1000])
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=5))
    slope, error, intercept = overhead_growth.fit_line(sizes, 3e-4 * sizes**0.9 * noise)
    expected = stats.linregress(np.log(sizes), np.log(3e-4 * sizes**0.9 * noise))
    np.testing.assert_allclose(
        (slope, error, intercept), (expected.slope, expected.stderr, expected.intercept), rtol=1e-12
    )
    exact = overhead_growth.fit_line(sizes, 3e-4 * sizes**0.9)
    np.testing.assert_allclose(exact, (0.9, 0, np.log(3e-4)), atol=1e-9)


def test_a_difference_that_noise_has_made_negative_leaves_no_slope(overhead_growth):
    assert np.isnan(overhead_growth.fit_line([1, 2, 3], [0.5, -0.1, 0.7])).all()


def test_gradients_of_tables_are_dense_and_move_their_first_rows(overhead_growth):
    import overhead_tensorflow
    import tensorflow as tf

    inner = []

    def make():
        inner.append(overhead_growth.make_tables(count=3, rows=50))
        return inner[-1]

    step = overhead_tensorflow.prepare("PolyakModel", make, 1, False)
    tables = inner[0].trainable_variables
    assert [table.shape for table in tables] == [(50, 32)] * 3
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(inner[0](tf.ones((1, 1))))
    for gradient in tape.gradient(loss, [table.value for table in tables]):
        assert isinstance(gradient, tf.Tensor)
        assert gradient.shape == (50, 32)
    step()
    for table in tables:
        moved = (table.numpy() != 1).any(axis=1)
        assert moved.tolist() == [True] + [False] * 49


def test_growth_is_measured_and_plotted_both_ways(overhead_growth, tmp_path, capsys):
    import overhead

    sizes = ["--parameters", "1024", "2048", "4096", "--variables", "1", "2", "4"]
    plot = tmp_path / "growth.png"
    results = overhead.main(["--growth", *sizes, "--rounds", "2", "--plot", str(plot)])
    assert {way: list(own) for way, own in results.items()} == {
        "parameters": [1024, 2048, 4096],
        "variables": [1, 2, 4],
    }
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line[:2] for line in printed if line[:1] in (["parameters"], ["variables"])]
    assert rows[:6] == [[way, f"{size:,}"] for way, own in results.items() for size in own]
    assert [line[0] for line in printed[-2:]] == list(results)
    assert plot.stat().st_size > 0
