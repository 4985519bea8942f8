import os
import pathlib
import pty
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner
from weight_samples import WRITERS, write_hdf5, write_keras

import polyak_model
from polyak_model.cli import app as cli
from polyak_model.weight_files.reader import open_weights

HISTORY = "epoch,loss,val_loss\n0,3,0.5\n1,2,0.3\n2,1,0.4\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: a folder `run` with three epochs, whose weights are 1, 2 and 6."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for n, value in enumerate((1, 2, 6), 1):
        tensors = {"layers/dense/vars/0": np.full(3, value, "float32")}
        write_hdf5(tmp_path / f"run/epoch-{n}.weights.h5", tensors)
    (tmp_path / "history.csv").write_text(HISTORY)
    return tmp_path


FILES = [f"run/epoch-{n}.weights.h5" for n in (1, 2, 3)]
OUT = ["-o", "out.weights.h5"]


def averaged(*arguments):
    """Runs the command and returns the average of the one number in the files."""
    assert cli.main(["average", *arguments, *OUT]) == 0
    with open_weights("out.weights.h5") as weights:
        (value,) = set(weights.variables["layers/dense/vars/0"].read().tolist())
    return value


def test_files_are_averaged_and_their_shares_are_printed(folder, capfd):
    assert averaged(*FILES) == 3
    output, complaint = capfd.readouterr()
    assert output.splitlines() == [
        "Averaged 3 files:",
        *(f"   33.33 %  {name}" for name in FILES),
        "Written: out.weights.h5",
    ]
    assert complaint == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [*FILES, "--weights", "1", "2", "3"],
        ["--weights", "1", "2", "3", *FILES],
        [FILES[0], "--weights", "1,2,3", *FILES[1:]],
        [*FILES, "--weights=1,2,3"],
        [*FILES, "--weights", "0.5", "1e0", "1.5"],
    ],
)
def test_weights_can_be_separated_by_spaces_or_commas(folder, arguments):
    assert averaged(*arguments) == pytest.approx((1 + 2 * 2 + 3 * 6) / 6, rel=1e-7)


@pytest.mark.parametrize(
    ("arguments", "shares"),
    [
        (["uniform"], [1, 1, 1]),
        (["exponential", "--decay", "0.9"], [0.81, 0.9, 1]),
        (["exponential", "--decay", "0"], [0, 0, 1]),
        (["polynomial", "--eta", "1"], [1, 2, 3]),
        (["polynomial"], [1, 4, 10]),
        (["power", "--gamma", "1"], [1, 3, 5]),
    ],
)
def test_a_rule_weights_later_files_more(folder, arguments, shares):
    expected = np.dot(shares, [1, 2, 6]) / np.sum(shares)
    assert averaged(*FILES, "--rule", *arguments) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--last", "2"], 4),
        ([*FILES, "--last", "2"], 4),
        (["run", "--best", "2", "--by", "history.csv:val_loss", "--mode", "min"], 4),
        (["run", "--best", "2", "--by", "history.csv:loss", "--mode", "max"], 1.5),
        ([*FILES, "--last", "3"], 3),
    ],
)
def test_the_last_or_the_best_files_are_chosen(folder, arguments, expected):
    assert averaged(*arguments) == expected


def test_variables_that_are_copied_are_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    paths = [str(write_keras(tmp_path / f"{n}.keras")) for n in "ab"]
    assert cli.main(["average", *paths, "-o", "out.keras"]) == 0
    line = "Copied from the last file: layers/dropout/seed_generator/vars/0."
    assert line in capfd.readouterr().out


@pytest.mark.parametrize("ending", WRITERS)
def test_the_batch_normalization_hint_is_one_line(tmp_path, monkeypatch, capfd, ending):
    monkeypatch.chdir(tmp_path)
    tensors = {f"layers/batch_normalization_{n}/vars/0": np.ones(2) for n in range(4)}
    paths = [str(WRITERS[ending](tmp_path / f"{n}{ending}", tensors)) for n in "ab"]
    assert cli.main(["average", *paths, *OUT]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2] == "Written: out.weights.h5"
    assert lines[-1].startswith(
        "BatchNormalization: the averaged statistics of layers/batch_normalization_0, "
        "layers/batch_normalization_1 and 2 more do not match"
    )
    assert "`polyak_model.refresh_statistics(model, data)`" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*FILES], "Missing option"),
        ([*OUT], "Missing argument"),
        ([FILES[0], *OUT], "at least two files"),
        ([*FILES, "nowhere.keras", *OUT], "'nowhere.keras' does not exist"),
        ([*FILES, "-o", FILES[0]], "it is one of the files to read"),
        ([*FILES, "--weights", "1", "2", *OUT], "2 weights for 3 files"),
        ([*FILES, "--weights", "1", "0", "1", *OUT], "must be positive finite numbers"),
        ([*FILES, "--weights", "1", "-1", "1", *OUT], "Received: 1,-1,1"),
        ([*FILES, "--weights", "1", "inf", "1", *OUT], "must be positive finite numbers"),
        ([*FILES, "--weights", "one", *OUT], "Received: one. Try --weights 1 2 3."),
        ([*FILES, *OUT, "--weights"], "requires an argument"),
        ([*FILES, "--weights", "1,2,3", "--rule", "power", *OUT], "cannot be combined"),
        ([*FILES, "--weights", "1,2,3", "--decay", "0.9", *OUT], "cannot be combined"),
        (
            [*FILES, "--rule", "ema", *OUT],
            "'ema' is not one of 'uniform', 'exponential', 'polynomial', 'power'",
        ),
        ([*FILES, "--rule", "exponential", *OUT], "needs `--decay`. Try --decay 0.9."),
        ([*FILES, "--rule", "exponential", "--decay", "1", *OUT], "in [0, 1)"),
        ([*FILES, "--rule", "power", "--gamma", "-1", *OUT], "Invalid value for '--gamma'"),
        (
            [*FILES, "--rule", "power", "--decay", "0.9", *OUT],
            "`--decay` does not apply to --rule power",
        ),
        ([*FILES, "--decay", "0.9", *OUT], "`--decay` does not apply to --rule uniform"),
        (
            ["run", *OUT],
            "with --last or --best. Received: run. To average all files in it, pass run/*.",
        ),
        (["run", FILES[0], "--last", "2", *OUT], "A folder must be the only input"),
        (["run", "--last", "1", *OUT], "Invalid value for '--last'"),
        (["run", "--last", "4", *OUT], "but there are 3"),
        (["run", "--last", "2", "--best", "2", *OUT], "cannot be combined"),
        (["run", "--best", "2", *OUT], "must be given together"),
        (["run", "--best", "2", "--by", "history.csv:loss", *OUT], "must be given together"),
        ([*FILES, "--mode", "min", *OUT], "must be given together"),
        (["run", "--best", "2", "--by", "history.csv", "--mode", "min", *OUT], "FILE.csv:COLUMN"),
        (
            ["run", "--best", "2", "--by", "history.csv:loss", "--mode", "up", *OUT],
            "'up' is not one of 'min', 'max'",
        ),
        (
            ["run", "--best", "2", "--by", "history.csv:acc", "--mode", "max", *OUT],
            "no column 'acc'",
        ),
    ],
)
def test_unusable_input_is_refused_in_one_line(folder, capfd, arguments, expected):
    before = sorted(folder.rglob("*"))
    assert cli.main(["average", *arguments]) == 2
    output, complaint = capfd.readouterr()
    assert output == ""
    assert complaint.startswith("Error: ")
    assert complaint.count("\n") == 1
    assert expected in complaint
    assert sorted(folder.rglob("*")) == before


def run_process(folder, program, environment=None, **options):
    root = str(pathlib.Path(polyak_model.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root, "TERM": "xterm"} | (environment or {}),
        check=True,
        **options,
    )


@pytest.mark.processes
def test_neither_keras_nor_tensorflow_is_imported(folder):
    program = (
        "import sys; from polyak_model.cli.app import main\n"
        f"code = main(['average', *{FILES}, '-o', 'out.weights.h5'])\n"
        "print({'keras', 'tensorflow'} & set(sys.modules), code)"
    )
    done = run_process(folder, program, capture_output=True, text=True)
    assert done.stdout.endswith("set() 0\n")
    assert done.stderr == ""


def run_on_a_terminal(folder, *arguments, **environment):
    """Runs a command whose stderr is a terminal, and returns what it writes there."""
    terminal, stderr = pty.openpty()
    program = f"from polyak_model.cli.app import main; main({list(arguments)})"
    run_process(folder, program, stderr=stderr, stdout=subprocess.DEVNULL, environment=environment)
    os.write(stderr, b"end")
    os.close(stderr)
    text = b""
    while not text.endswith(b"end"):  # A terminal returns a few kilobytes at a time.
        text += os.read(terminal, 10**5)
    os.close(terminal)
    return text.decode()


@pytest.mark.processes
def test_a_progress_bar_is_drawn_on_a_terminal_and_erased(folder):
    text = run_on_a_terminal(folder, "average", *FILES, *OUT)
    assert "Averaging" in text
    assert "100%" in text
    assert text.endswith("\x1b[2Kend")
    assert run_on_a_terminal(folder, "average", *FILES, *OUT, "--quiet") == "end"


@pytest.mark.processes
def test_the_progress_bar_has_no_colors_with_no_color(folder):
    colors = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colors.search(run_on_a_terminal(folder, "average", *FILES, *OUT, NO_COLOR=""))
    assert not colors.search(run_on_a_terminal(folder, "average", *FILES, *OUT, NO_COLOR="1"))


def test_quiet_prints_nothing(folder, capfd):
    averaged(*FILES, "--quiet")
    assert capfd.readouterr() == ("", "")


def test_control_characters_in_paths_are_escaped(folder, capfd):
    odd = shutil.copy(FILES[0], "\x1b[2J\n.weights.h5")
    assert cli.main(["average", odd, *FILES[1:], *OUT]) == 0
    assert cli.main(["average", FILES[0], FILES[1], "-o", odd]) == 0
    assert cli.main(["average", odd, odd, *OUT]) == 2
    output, complaint = capfd.readouterr()
    assert output.count("\\x1b[2J\\n.weights.h5\n") == 2
    assert "\\x1b[2J\\n.weights.h5'" in complaint
    assert (output + complaint).replace("\n", "").isprintable()


def test_the_help_shows_every_option():
    text = CliRunner().invoke(cli.build_app(), ["average", "--help"]).stdout
    for option in ("--output", "--weights", "--rule", "--decay", "--last", "--best", "--by"):
        assert option in text


def test_the_same_arguments_give_the_same_bytes(folder):
    averaged(*FILES)
    first = pathlib.Path("out.weights.h5").read_bytes()
    averaged(*FILES)
    assert pathlib.Path("out.weights.h5").read_bytes() == first
