"""Experiments on the length of an average, on little data."""

import json

import diffusion_length
import epochs_to_reach
import mnist
import numpy as np
import picked_afterwards
import pytest
import rebuilt_errors
from matplotlib.image import imread

pytestmark = [
    pytest.mark.benchmarks,
    pytest.mark.filterwarnings("ignore:The average '.*' remembers"),
]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Noise instead of digits, of which every setting takes the same few."""
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(200, 28, 28, 1)).astype("float32")
    monkeypatch.setattr(mnist, "images", lambda: (x, np.arange(200) // 20))


def run(script, tmp_path, *arguments):
    """Runs a script with two seeds and returns the numbers that it writes."""
    plot, numbers = tmp_path / "plot.png", tmp_path / "numbers.json"
    files = ["--plot", str(plot), "--json", str(numbers)]
    script.main(["--seeds", "2", *files, *arguments])
    assert imread(plot).std() > 0
    return json.loads(numbers.read_text())


def test_the_first_epoch_counts_at_which_an_average_is_as_good_as_raw_at_the_end():
    raw, early, late, never = [4.0, 2, 2, 2], [3, 2, 1, 1], [9, 9, 9, 2], [4, 3, 3, 3]
    epochs = epochs_to_reach.epochs_to_reach(np.array([raw, early, late, never]))
    assert epochs.tolist() == [2, 4, np.inf]


def test_epochs_to_reach_reports_the_default_and_the_best(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(epochs_to_reach, "WIDTHS", epochs_to_reach.WIDTHS[1:3])
    monkeypatch.setattr(epochs_to_reach, "DEFAULT", 1)
    found = run(epochs_to_reach, tmp_path, "--epochs", "3")
    losses = np.array(found["losses"])
    assert losses.shape == (2, 2, 3, 3)
    _, table = capsys.readouterr().out.split("\n\n")
    lines = table.splitlines()[1:]
    assert len(lines) == 6
    assert f"{losses[0, :, 0].mean():.4f}" in lines[0]


def test_what_is_best_on_one_half_is_scored_on_the_other():
    assert picked_afterwards.pick(np.array([[0.3, 0.1], [0.2, 0.4]])) == 0.4


def test_averages_that_are_rebuilt_score_as_those_that_were_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        picked_afterwards, "SETTINGS", {"short": picked_afterwards.SETTINGS["short, true labels"]}
    )
    monkeypatch.setattr(picked_afterwards, "RULES", picked_afterwards.RULES[1:3])
    monkeypatch.setattr(picked_afterwards, "WIDTHS", picked_afterwards.WIDTHS[1:3])
    monkeypatch.setattr(picked_afterwards, "DEFAULT", 1)
    found = run(picked_afterwards, tmp_path)
    losses = dict(zip(found["ways"], np.moveaxis(found["losses"], 2, 0), strict=True))
    np.testing.assert_allclose(losses["one training"], losses["kept"], rtol=1e-2)
    assert not np.array_equal(losses["grid"], losses["kept"])
    assert "rebuilt and kept averages differ by at most" in capsys.readouterr().out


def test_errors_are_measured_and_told_for_every_average_and_count(monkeypatch, tmp_path, capsys):
    net = "regression"
    nets = {net: lambda seed, images: rebuilt_errors.regression(seed, images, epochs=2)}
    monkeypatch.setattr(rebuilt_errors, "NETS", nets)
    monkeypatch.setattr(rebuilt_errors, "COUNTS", (4,))
    found = run(rebuilt_errors, tmp_path)
    errors = np.array(found["errors"])
    assert errors.shape == (1, 2, 1, 8, 2)
    assert (errors > 0).all()
    told, measured = np.moveaxis(errors, -1, 0)
    assert f"at most 3 in {np.mean(measured / told <= 3):.0%}" in capsys.readouterr().out


def test_digits_are_drawn_by_the_raw_model_and_every_average(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(diffusion_length, "WIDTHS", (0.10, 0.20))
    found = run(diffusion_length, tmp_path, "--steps", "40", "--samples", "20")
    assert np.shape(found["scores"]) == (1, 2, 3, 2)
    assert "distance of training digits to held-out ones" in capsys.readouterr().out
