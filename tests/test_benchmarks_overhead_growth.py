import pathlib

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def overhead_growth(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overhead_growth

    return overhead_growth


@pytest.mark.without_keras
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


@pytest.mark.without_keras
def test_a_difference_that_noise_has_made_negative_leaves_no_slope(overhead_growth):
    assert np.isnan(overhead_growth.fit_line([1, 2, 3], [0.5, -0.1, 0.7])).all()


def test_gradients_of_tables_are_single_rows_and_all_tables_are_averaged(overhead_growth):
    import keras
    import tensorflow as tf

    from polyak_model import PolyakModel

    model = PolyakModel(overhead_growth.make_tables(count=3, rows=50))
    tables = model.raw_model.trainable_variables
    assert [table.shape for table in tables] == [(50, 32)] * 3
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model.raw_model(tf.ones((1, 1))))
    for gradient in tape.gradient(loss, [table.value for table in tables]):
        assert isinstance(gradient, tf.IndexedSlices)
        assert gradient.values.shape == (1, 32)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.train_on_batch(np.ones((1, 1)), np.zeros((1, 32)))
    for raw, average in zip(tables, model.average_model.weights, strict=True):
        assert raw.numpy()[0, 0] != 1
        # The first iterate is the whole average.
        np.testing.assert_array_equal(average.numpy(), raw.numpy())


def test_growth_is_measured_both_ways(overhead_growth, monkeypatch, tmp_path, capsys):
    import overhead
    import training_steps

    seconds = {}

    def timed(step):
        step()
        return seconds.setdefault(step, 1e-3 * (1 + len(seconds) % 3))

    monkeypatch.setattr(training_steps, "timed", timed)
    parameters, variables = ["1000", "2000", "4000"], ["1", "2", "3"]
    sizes = ["--parameters", *parameters, "--variables", *variables, "--rounds", "2"]
    results = overhead.main(["--growth", *sizes, "--plot", str(tmp_path / "growth.png")])
    assert {way: [str(n) for n in own] for way, own in results.items()} == {
        "parameters": parameters,
        "variables": variables,
    }
    printed = capsys.readouterr().out.splitlines()
    # Bare, wrapped and floor take 1, 2 and 3 ms, whatever the size.
    cells = ["1.000", "3.000", "1.000", "±", "0.000", "0.33"]
    assert [line.split()[2:] for line in printed if "±" in line][:6] == [cells] * 6
    assert printed[-2].split()[:4] == ["parameters", "0.000", "±", "0.000"]
    assert printed[-1].split()[:4] == ["variables", "0.000", "±", "0.000"]
    assert (tmp_path / "growth.png").stat().st_size > 0
