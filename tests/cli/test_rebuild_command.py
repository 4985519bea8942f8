import numpy as np
import pytest
from snapshot_samples import KERNEL, MEAN, SEED, average, make_walk, write_run
from weight_samples import write_keras

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage
from polyak_model.cli.targets import describe_rule, make_rule
from polyak_model.errors import InputError
from polyak_model.weight_files.reader import open_weights


@pytest.fixture(autouse=True)
def folder(working_folder, tmp_path):
    write_run(tmp_path / "run")
    tensors = {KERNEL: np.zeros((3, 2), "float32"), MEAN: np.zeros(2, "float32")}
    write_keras(tmp_path / "model.keras", {**tensors, SEED: np.zeros(2, "uint32")})


def test_the_average_is_written_and_its_error_printed(run):
    text = run(
        "rebuild", "run", "--relative-width", 0.15, "-o", "out.keras", "--like", "model.keras"
    )
    lines = text.splitlines()
    assert lines[0] == "Average: power, relative width 0.15, at step 800, from 16 snapshots."
    assert lines[1].startswith("It differs from the true one by about 0.")
    assert "% of its distance from the raw weights (profile error 0.0" in lines[1]
    assert lines[2] == "Written: out.keras"
    assert lines[3].startswith("BatchNormalization: the averaged statistics of layers/batch_norm")
    with open_weights("out.keras") as weights:
        received = weights.variables[KERNEL].read()
    true = average(PowerAverage.from_relative_width(0.15), make_walk(), 800)
    np.testing.assert_allclose(received, true, atol=0.1)


def test_without_an_output_the_errors_are_printed(run):
    assert "from 12 snapshots" in run("rebuild", "run", "--half-life", 100, "--step", 600)


def test_quiet_prints_nothing(run):
    arguments = ("rebuild", "run", "--decay", 0.99, "-o", "out.weights.h5", "--quiet")
    assert run(*arguments) == ""


def test_notes_are_printed(run, tmp_path):
    write_run(tmp_path / "run", steps=(640,), sequence=100)
    text = run("rebuild", "run", "--relative-width", 0.1, "--max-error", 1)
    assert "training went back to an earlier step than 640." in text


WRITTEN = ("--relative-width", 0.1, "-o", "out.keras", "--like", "model.keras")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "must have a length. Received: none. Try --relative-width 0.1"),
        (["--rule", "polynomial"], "Received: none. Try --eta 3."),
        (["--decay", 0.9, "--eta", 3], "Received: `--decay` and `--eta`. Leave all but one out."),
        (["--rule", "power", "--decay", 0.9], "`--decay` does not apply to --rule power."),
        (["--rule", "uniform", "--decay", 0.9], "`--decay` does not apply to --rule uniform."),
        (["--decay", 1.5], "`--decay` is out of range: `decay` must be a number in [0, 1)"),
        (["--relative-width", 0.5], "`--relative-width` is out of range: `sigma_rel` must be"),
        (["--relative-width", 0.005], "The nearest that can be rebuilt has relative width 0.0"),
        (["--relative-width", 0.1, "--step", 801], "to 800, that of the last. Received: 801."),
        (["--relative-width", 0.1, "-o", "out.keras"], "snapshots contain no architecture"),
        (["--relative-width", 0.1, "--refresh", "model.keras"], "`--refresh` needs --like"),
        (
            [*WRITTEN, "--refresh", "model.keras"],
            "`--refresh` must be an .npz file of training data with an array `x`",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(refused, arguments, expected):
    assert expected in refused("rebuild", "run", *arguments)


def test_a_folder_without_snapshots_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "it contains no snapshots" in refused("rebuild", "empty", "--decay", 0.9)


RULES = [
    ("power", {"relative-width": 0.1}, 0, PowerAverage.from_relative_width(0.1)),
    (None, {"gamma": 5.0}, 7, PowerAverage(5.0, start_step=7)),
    (None, {"decay": 0.9}, 0, ExponentialAverage(0.9)),
    ("exponential", {"half-life": 20}, 0, ExponentialAverage.from_half_life(20)),
    (None, {"eta": 2}, 0, PolynomialAverage(2)),
    ("uniform", {}, 0, UniformAverage()),
    (None, {"decay": None}, 9, UniformAverage(9)),
]


@pytest.mark.parametrize(("name", "lengths", "start", "expected"), RULES)
def test_options_name_a_rule(name, lengths, start, expected):
    assert make_rule(name, lengths, start) == expected


def test_nothing_is_no_rule():
    with pytest.raises(InputError):
        make_rule(None, {})


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            PowerAverage.from_relative_width(0.1, start_step=7),
            "power, relative width 0.1 from step 7",
        ),
        (ExponentialAverage(0.99), "exponential, decay 0.99"),
        (UniformAverage(), "uniform"),
        (PolynomialAverage(3), "polynomial, eta 3"),
    ],
)
def test_a_rule_is_described_in_a_few_words(rule, text):
    assert describe_rule(rule) == text
