import json
import re

import mnist
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.image import imread

from polyak_model import PolyakModel, PowerAverage

pytestmark = [
    pytest.mark.benchmarks,
    pytest.mark.filterwarnings("ignore:Even though the `tf.config:UserWarning"),
]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts learn patterns in noise, and trace nothing."""
    y = np.arange(1_000) // 100
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(1_000, 28, 28, 1)) + generator.uniform(size=(10, 28, 28, 1))[y]
    x = x.astype("float32")
    monkeypatch.setattr(mnist, "images", lambda: (x, y))
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def test_the_standard_error_is_that_of_a_mean_of_independent_numbers():
    mean, error = mnist.mean_and_error([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    assert mean.tolist() == [3, 5]
    # The squared deviations 4, 1 and 9 over 3 - 1 degrees of freedom, and over 3 numbers.
    np.testing.assert_allclose(error, [(14 / 2 / 3) ** 0.5, 0], rtol=1e-15)


def test_random_labels_hit_their_share_and_are_drawn_from_all_classes():
    y = np.full(10_000, 3)
    labels = mnist.random_labels(y, 0.4, seed=0)
    assert set(y) == {3}
    # The counts of nine classes, 400 expected in each, within five standard deviations.
    counts = np.bincount(np.delete(labels, labels == 3), minlength=10)
    assert np.all(np.abs(np.delete(counts, 3) - 400) < 5 * 400**0.5)
    # Of so many classes none is drawn by chance that was there: all hits show.
    assert np.sum(mnist.random_labels(y, 0.4, seed=0, classes=10**12) != y) == 4_000


def test_random_labels_are_never_among_those_held_out():
    (x, true), held_out = mnist.load(seed=0)
    (x_noisy, noisy), held_out_too = mnist.load(seed=0, share=0.4)
    assert 0.3 < np.mean(noisy != true) < 0.4
    np.testing.assert_array_equal(x, x_noisy)
    for array, same in zip(held_out, held_out_too, strict=True):
        np.testing.assert_array_equal(array, same)


def test_the_cosine_falls_from_the_rate_to_0():
    rate = mnist.build_model("cosine", 0.1, 50, seed=0).optimizer._learning_rate
    np.testing.assert_allclose([rate(0), rate(25), rate(50)], [0.1, 0.05, 0], atol=1e-8)


def shown(table):
    """Splits a table at two spaces or more into rows of cells."""
    return [re.split(r"\s{2,}", line) for line in table.splitlines()]


def measured(scores, sign="-"):
    """What a table says of accuracies and negative log-likelihoods, one pair of each seed."""
    means, errors = np.mean(scores, axis=0), np.std(scores, axis=0) / (len(scores) - 1) ** 0.5
    return [
        f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"
        for mean, error, digits in zip(means, errors, (2, 4), strict=True)
    ]


def test_raw_average_ensemble_prints_what_a_hand_made_computation_gives(
    monkeypatch, capsys, tmp_path
):
    import raw_average_ensemble as script

    monkeypatch.setattr(script, "SCHEDULES", ("cosine",))
    monkeypatch.setattr(script, "SHARES", (0.4,))
    plot, numbers = tmp_path / "plot.png", tmp_path / "numbers.json"
    sizes = ["--seed", "3", "--seeds", "2", "--epochs", "1", "--images", "100"]
    script.main([*sizes, "--plot", str(plot), "--json", str(numbers)])

    written = json.loads(numbers.read_text())
    runs = written["runs"]["cosine rate, 40% random labels"]
    assert written["seeds"] == [3, 4]
    training, (x, y) = mnist.load(3, 0.4, 100)
    model = PolyakModel(mnist.build_model("cosine", script.RATE, 3, 3), 0.5 ** (1 / 3))
    model.fit(*training, batch_size=32, verbose=0)
    raw, average = (np.float64(m(x)) for m in (model.raw_model, model.average_model))
    for (accuracy, loss), answer in zip(
        np.array(runs)[0, ..., 0], (raw, average, (raw + average) / 2), strict=True
    ):
        assert accuracy == pytest.approx(100 * np.mean(answer.argmax(axis=1) == y), rel=1e-6)
        assert loss == pytest.approx(-np.log(answer[np.arange(len(y)), y]).mean(), rel=1e-6)

    header, *rows = shown(capsys.readouterr().out.split("\n\n")[1])
    assert header == ["rate", "random labels", "route", "accuracy, %", "NLL"]
    raw, average, ensemble = np.moveaxis(np.array(runs)[..., -1], 1, 0)
    expected = {
        "raw": measured(raw),
        "average": measured(average),
        "ensemble": measured(ensemble),
        "average - raw": measured(average - raw, "+"),
        "ensemble - raw": measured(ensemble - raw, "+"),
    }
    assert rows == [["cosine", "40%", *row] for row in ([n, *c] for n, c in expected.items())]
    assert imread(plot).std() > 0


def test_constant_or_cosine_scores_each_method_when_a_budget_is_spent():
    import constant_or_cosine as script

    scores = script.measure(0.1, 1, [1, 2], images=100)
    assert scores.shape == (4, 2, 2, 2)
    (x, y), (x_held_out, y_held_out) = mnist.load(1, size=100)

    def train(model, epochs):
        for epoch in range(epochs):
            model.fit(x[16:], y[16:], initial_epoch=epoch, epochs=epoch + 1, verbose=0)
        return model

    def likelihood(model):
        answers = np.float64(model(x_held_out))[np.arange(20), y_held_out]
        return pytest.approx(-np.log(answers).mean(), rel=1e-6)

    for method, average in ((1, 0.5 ** (1 / 2)), (2, PowerAverage())):
        model = train(PolyakModel(mnist.build_model("constant", 0.1, None, seed=1), average), 2)
        assert scores[method, 1, 1, 1] == likelihood(model.average_model)
        # Whatever the average, the seed says which iterates it is of.
        assert scores[0, 1, 1, 1] == likelihood(model.raw_model)
    for epochs in (1, 2):
        model = train(mnist.build_model("cosine", 0.1, 2 * epochs, seed=1), epochs)
        assert scores[3, epochs - 1, 1, 1] == likelihood(model)
    assert len(set(scores[:, :, 1, 1].flat)) == 8


def test_constant_or_cosine_shows_held_out_scores_at_the_rate_that_validation_chose(
    monkeypatch, capsys, tmp_path
):
    import constant_or_cosine as script

    plot, numbers = tmp_path / "plot.png", tmp_path / "numbers.json"
    rates = ["0.1", "0.4"]
    sizes = ["--seeds", "2", "--rates", *rates, "--budgets", "1", "--images", "100"]
    generator, measured_ones = np.random.default_rng(0), []

    # Another test trains; here scores are drawn, in turns accuracy in per cent and likelihood.
    def draw_scores(*settings):
        measured_ones.append(settings)
        return generator.uniform(size=(4, 1, 2, 2)) * [100, 1]

    monkeypatch.setattr(script, "measure", draw_scores)
    script.main([*sizes, "--plot", str(plot), "--json", str(numbers)])
    assert measured_ones == [(r, s, [1], 0.0, 100) for r in (0.1, 0.4) for s in (0, 1)]
    scores = np.array(json.loads(numbers.read_text())["scores"])
    assert scores.shape == (2, 2, 4, 1, 2, 2)
    assert imread(plot).std() > 0

    tables = capsys.readouterr().out.split("\n\n")
    _, *rows = shown(tables[2])
    assert len(rows) == 2 * 4
    for r, m in np.ndindex(2, 4):
        row = rows[4 * r + m]
        assert row[:3] == ["1", rates[r], list(script.METHODS)[m]]
        method, cosine = scores[r, :, m, 0, 1], scores[r, :, 3, 0, 1]
        cells = zip(measured(method), measured(method - cosine, "+"), strict=True)
        # The cosine is not compared with itself.
        expected = [cell for pair in cells for cell in (pair if m < 3 else pair[:1])]
        assert row[3:] == expected

    _, *rows = shown(tables[4])
    validation, held_out = np.moveaxis(scores[:, :, :, 0], 3, 0)
    for m, row in enumerate(rows):
        best = validation.mean(axis=1)[:, m]
        by_accuracy, by_likelihood = best[:, 0].argmax(), best[:, 1].argmin()
        assert row[:4] == [
            "1",
            list(script.METHODS)[m],
            rates[by_accuracy],
            measured(held_out[by_accuracy, :, m])[0],
        ]
        assert rates[by_likelihood] in row[4:]
        assert measured(held_out[by_likelihood, :, m])[1] in row[5:]


@pytest.mark.parametrize("budgets", [["2", "1"], ["1", "1"], ["0"]])
def test_budgets_that_do_not_rise_are_refused(budgets, capsys):
    import constant_or_cosine as script

    with pytest.raises(SystemExit):
        script.main(["--budgets", *budgets])
    assert "must rise" in capsys.readouterr().err


def test_a_single_seed_is_refused_since_it_has_no_standard_error(capsys):
    import raw_average_ensemble as script

    with pytest.raises(SystemExit):
        script.main(["--seeds", "1"])
    assert "at least 2 seeds" in capsys.readouterr().err
