import json

import default_rule
import diffusion
import mnist
import numpy as np
import pytest
from matplotlib.image import imread
from settings import SETTINGS

from polyak_model import PolyakModel

pytestmark = [
    pytest.mark.benchmarks,
    pytest.mark.filterwarnings("ignore:The average '.*' remembers"),
]


@pytest.fixture
def few_images(monkeypatch):
    """Noise instead of digits, of which every setting takes the same few."""
    generator = np.random.default_rng(0)
    x = generator.uniform(size=(100, 28, 28, 1)).astype("float32")
    monkeypatch.setattr(mnist, "images", lambda: (x, np.arange(100) // 10))


def test_the_regret_is_the_distance_from_the_rule_of_the_best_mean():
    # Two settings, three seeds, two rules and the raw model.
    first = [[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [6.0, 2.0, 5.0]]
    second = [[4.0, 7.0, 9.0], [4.0, 7.0, 9.0], [4.0, 7.0, 9.0]]
    regret = default_rule.regret([first, second])
    assert regret[0].tolist() == [[-1, 0, -2], [0, 0, -2], [4, 0, 3]]
    assert regret[1].tolist() == [[0, 3, 5]] * 3
    # The second rule is worse at its worst, and the raw model is never ranked.
    assert default_rule.order(regret) == [0, 1, 2]


def test_the_tail_rules_start_at_the_half_and_at_the_last_quarter():
    rules = default_rule.rules(80)
    assert len(rules) == 15
    assert rules["last half"].start_step == 40
    assert rules["last quarter"].start_step == 60


def test_a_model_that_is_restarted_trains_like_a_fresh_one(few_images):
    both = default_rule.measure("cosine", [0, 1])
    alone = default_rule.measure("cosine", [1])
    np.testing.assert_array_equal(both[1], alone[0])
    assert not np.array_equal(both[0], both[1])


def test_the_scores_are_those_of_the_averages_and_of_the_raw_model(few_images):
    scores = default_rule.measure("large batches", [3])[0]
    training = SETTINGS["large batches"](3, None)
    rule = default_rule.rules(training.steps)["power 0.15"]
    model = PolyakModel(training.model, rule)
    model.fit(**training.arguments, verbose=0)
    x, y = training.held_out
    for name, each in (("power 0.15", model.average_model), (default_rule.RAW, model.raw_model)):
        answer = np.float64(each(x))
        accuracy, likelihood = scores[default_rule.NAMES.index(name)]
        assert accuracy == pytest.approx(100 * np.mean(answer.argmax(axis=1) == y), rel=1e-6)
        assert likelihood == pytest.approx(-np.log(answer[np.arange(len(y)), y]).mean(), rel=1e-5)


def test_the_tables_and_the_file_agree(few_images, capsys, tmp_path):
    plot, numbers = tmp_path / "plot.png", tmp_path / "numbers.json"
    settings = ["--settings", "regression", "fine-tuning", "--seeds", "2"]
    default_rule.main([*settings, "--plot", str(plot), "--json", str(numbers)])
    scores = np.array(json.loads(numbers.read_text())["scores"])
    assert scores.shape == (2, 2, 16, 2)
    assert np.isnan(scores[0, ..., 0]).all()
    _, likelihood, _, accuracy = capsys.readouterr().out.split("\n\n")[:4]
    for table, column, settings in ((likelihood, scores[..., 1], 2), (accuracy, None, 1)):
        header, *lines = table.splitlines()
        assert len(lines) == 16
        assert lines[-1].startswith("raw ")
        assert ("regression" in header) == (settings == 2)
        worst = [float(line.split()[-2]) for line in lines[:-1]]
        assert worst == sorted(worst)
        if column is not None:
            regrets = 1000 * (column - column[..., :-1].mean(axis=1).min(axis=1)[:, None, None])
            smallest = regrets.mean(axis=1).max(axis=0)[:-1].min()
            assert worst[0] == pytest.approx(smallest, abs=0.06)
    assert imread(plot).std() > 0


class Certain:
    """A net that answers the same digit at every noise level."""

    def __init__(self, digit):
        self.digit = digit

    def predict_on_batch(self, inputs):
        scaled, level = inputs[0], np.exp(4 * np.float64(inputs[1]))
        skip, out, scale = diffusion.scales(level)
        return (self.digit - skip * scaled / scale) / out


def test_the_sampler_draws_the_digit_of_which_the_net_is_certain():
    digit = diffusion.load(0)[1][0]
    # The lowest noise level is 0.002.
    drawn = diffusion.sample(Certain(digit), count=3, seed=0)
    np.testing.assert_allclose(drawn, np.tile(digit, (3, 1)), atol=1e-4)


def test_the_net_of_a_perfect_denoiser_answers_the_target():
    digits = diffusion.load(0)[1]
    inputs, targets = diffusion.pairs(digits, np.random.default_rng(0))
    answers = Certain(digits).predict_on_batch(inputs)
    np.testing.assert_allclose(answers, targets, rtol=1e-3, atol=1e-4)
    # As the preconditioning means it to be.
    assert np.std(targets) == pytest.approx(1, abs=0.05)


def test_the_sliced_distance_of_a_shift_is_its_root_mean_square_over_directions():
    points = np.random.default_rng(0).normal(size=(300, 1))
    assert diffusion.sliced_distance(points, points + 3) == pytest.approx(3, rel=1e-12)
    assert diffusion.sliced_distance(points, points) == 0
    points = np.random.default_rng(0).normal(size=(300, 9))
    shift = diffusion.sliced_distance(points, points + 3, directions=10_000)
    assert shift == pytest.approx(3, rel=0.03)
