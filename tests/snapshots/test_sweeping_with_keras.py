import keras
import numpy as np
import pytest

from polyak_model import AverageSnapshots, PolyakModel, PowerAverage, refresh_statistics
from polyak_model.errors import InputError
from polyak_model.snapshots import rebuild, sweep

width = PowerAverage.from_relative_width
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(400, 4)).astype("float32")
Y = (X @ [[1.0], [-1.0], [2.0], [0.5]] + GENERATOR.normal(size=(400, 1))).astype("float32")
HELD_OUT = (X[300:], Y[300:])
RULES = [width(0.05), width(0.1), width(0.2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Snapshots of a training with BatchNormalization, and its model."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    inner = keras.Sequential(
        [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model = PolyakModel(inner, average=width(0.08))
    model.compile(keras.optimizers.SGD(0.05), loss="mse", metrics=["mae"], run_eagerly=False)
    snapshots = AverageSnapshots(folder / "snapshots")
    model.fit(X[:300], Y[:300], batch_size=2, epochs=2, callbacks=[snapshots], verbose=0)
    model.average_model.save(folder / "like.keras")
    return folder


def run(trained, **changes):
    arguments = {"rules": RULES, "data": HELD_OUT, "metric": "loss", "like": trained / "like.keras"}
    return sweep(trained / "snapshots", **{**arguments, **changes})


def score(path, data=HELD_OUT):
    return keras.models.load_model(path).evaluate(*data, verbose=0, return_dict=True)


def test_scores_are_those_of_the_rebuilt_models(trained, tmp_path):
    result = run(trained)
    for row, rule in zip(result.rows, RULES, strict=True):
        like = trained / "like.keras"
        rebuilt = rebuild(trained / "snapshots", rule, tmp_path / "out.weights.h5", like)
        model = keras.models.load_model(like, compile=False)
        model.load_weights(tmp_path / "out.weights.h5")
        model.compile(loss="mse")
        assert row.score == pytest.approx(model.evaluate(*HELD_OUT, verbose=0), rel=1e-5)
        assert (row.rule, row.step) == (rule, 300)
        errors = (row.profile_error, row.walk_error, row.rounding)
        assert errors == (rebuilt.profile_error, rebuilt.walk_error, rebuilt.rounding)
    assert result.statistics == ["layers/batch_normalization"]


def test_standard_errors_are_those_of_the_mean_over_examples(trained, tmp_path):
    result = run(trained, metric="mae", output=tmp_path / "best.keras")
    predicted = keras.models.load_model(tmp_path / "best.keras").predict(HELD_OUT[0], verbose=0)
    deviations = np.abs(predicted - HELD_OUT[1])
    expected = deviations.std(ddof=1) / len(deviations) ** 0.5
    # Ten parts estimate a standard deviation to a quarter of its value.
    assert result.best.standard_error == pytest.approx(expected, rel=0.6)
    parts = deviations.reshape(10, 10).mean(1)
    assert result.best.standard_error == pytest.approx(parts.std(ddof=1) / 10**0.5, rel=1e-3)
    assert result.close == sum(
        abs(row.score - result.best.score) <= result.best.standard_error
        for row in result.rows
        if row is not result.best
    )


def test_a_metric_that_is_no_mean_has_no_standard_error(trained):
    result = run(trained, metric="r2_score")
    assert {row.standard_error for row in result.rows} == {None}
    assert result.close == 0


@pytest.mark.parametrize(("mode", "choose"), [(None, min), ("max", max)])
def test_the_best_is_written(trained, tmp_path, mode, choose):
    result = run(trained, mode=mode, output=tmp_path / "best.keras")
    assert result.best.score == choose(row.score for row in result.rows)
    assert score(tmp_path / "best.keras")["loss"] == pytest.approx(result.best.score, rel=1e-5)
    run(trained, mode=mode, output=tmp_path / "best.weights.h5")
    model = keras.models.load_model(tmp_path / "best.keras")
    expected = model.get_weights()
    model.load_weights(tmp_path / "best.weights.h5")
    for one, other in zip(expected, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_statistics_are_refreshed_before_scoring_and_writing(trained, tmp_path):
    result = run(trained, refresh=X[:300], rules=[width(0.1)], output=tmp_path / "best.keras")
    path = tmp_path / "out.keras"
    rebuild(trained / "snapshots", width(0.1), path, trained / "like.keras")
    model = keras.models.load_model(path, compile=False)
    refresh_statistics(model, X[:300], verbose=0)
    model.compile(loss="mse")
    assert result.best.score == pytest.approx(model.evaluate(*HELD_OUT, verbose=0), rel=1e-5)
    best = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_allclose(best.layers[0].moving_mean, X[:300].mean(0), atol=1e-6)


def test_each_step_is_scored(trained):
    result = run(trained, steps=[256, 300], max_error=0.5)
    assert [row.step for row in result.rows] == [256, 256, 256, 300, 300, 300]


def test_averages_that_are_too_far_are_not_scored(trained):
    result = run(trained, rules=[width(0.01), width(0.1)])
    assert result.rows[0].score is None
    assert result.rows[0].walk_error > 0.05
    assert result.best is result.rows[1]
    with pytest.raises(InputError, match="None of the 1 averages can be rebuilt with an error"):
        run(trained, rules=[width(0.01)])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metric": "accuracies"}, "`--metric` must be one of"),
        ({"data": (X[:, :2], Y)}, "Cannot score the model on the arrays"),
        ({"refresh": X[:, :2]}, "Cannot refresh the statistics with these inputs"),
        ({"output": "best.h5"}, "its name must end in"),
    ],
)
def test_what_cannot_be_used_is_refused(trained, changes, problem):
    with pytest.raises(InputError, match=problem):
        run(trained, **changes)


def test_progress_is_that_of_rebuilding_and_of_scoring(trained):
    shares = []
    run(trained, progress=shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] <= 0.5
    assert shares[-3:] == pytest.approx([3 / 6, 4 / 6, 5 / 6])


@pytest.mark.parametrize("together", [1, 2])
def test_averages_that_do_not_fit_on_the_disk_together_score_the_same(
    trained, together, monkeypatch
):
    expected = run(trained)
    size = (trained / "like.keras").stat().st_size
    monkeypatch.setattr("polyak_model.snapshots.sweeping._MOST_TOGETHER", together * size)
    shares = []
    assert run(trained, progress=shares.append).rows == expected.rows
    assert shares == sorted(shares)
