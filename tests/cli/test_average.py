import os
import pathlib
import pty
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
    """Three epochs as .weights.h5 in `run`, whose weights are 1, 2 and 6; the working directory."""
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
    """Runs the command; returns the average of the one number in the files."""
    assert cli.main(["average", *arguments, *OUT]) == 0
    with open_weights("out.weights.h5") as weights:
        (value,) = set(weights.variables["layers/dense/vars/0"].read().tolist())
    return value


def test_files_are_averaged_and_what_counted_how_much_is_printed(folder, capfd):
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
def test_weights_can_be_typed_in_every_way(folder, arguments):
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
def test_a_rule_counts_later_files_more(folder, arguments, shares):
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
def test_some_files_are_chosen(folder, arguments, expected):
    assert averaged(*arguments) == expected


def test_what_is_not_averaged_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    paths = [str(write_keras(tmp_path / f"{n}.keras")) for n in "ab"]
    assert cli.main(["average", *paths, "-o", "out.keras"]) == 0
    line = "Taken from the last file: layers/dropout/seed_generator/vars/0."
    assert line in capfd.readouterr().out


@pytest.mark.parametrize("ending", WRITERS)
def test_batch_normalization_is_told_in_one_line(tmp_path, monkeypatch, capfd, ending):
    monkeypatch.chdir(tmp_path)
    tensors = {f"layers/batch_normalization_{n}/vars/0": np.ones(2) for n in range(4)}
    paths = [str(WRITERS[ending](tmp_path / f"{n}{ending}", tensors)) for n in "ab"]
    assert cli.main(["average", *paths, *OUT]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2] == "Written: out.weights.h5"
    assert lines[-1].startswith(
        "BatchNormalization: the averaged statistics of layers/batch_normalization_0, "
        "layers/batch_normalization_1 and 2 more do not fit"
    )
    assert "`polyak_model.refresh_statistics(model, data)`" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*FILES], "Missing option"),
        ([*OUT], "Missing argument"),
        ([FILES[0], *OUT], "at least two files"),
        ([*FILES, "nowhere.keras", *OUT], "'nowhere.keras': No such file"),
        ([*FILES, "-o", FILES[0]], "it is one of the files to read"),
        ([*FILES, "--weights", "1", "2", *OUT], "2 weights for 3 files"),
        ([*FILES, "--weights", "1", "0", "1", *OUT], "must be positive finite numbers"),
        ([*FILES, "--weights", "1", "-1", "1", *OUT], "Received: 1,-1,1"),
        ([*FILES, "--weights", "1", "inf", "1", *OUT], "must be positive finite numbers"),
        ([*FILES, "--weights", "one", *OUT], "Received: one. Try --weights 1 2 3."),
        ([*FILES, *OUT, "--weights"], "requires an argument"),
        ([*FILES, "--weights", "1,2,3", "--rule", "power", *OUT], "exclude each other"),
        ([*FILES, "--weights", "1,2,3", "--decay", "0.9", *OUT], "exclude each other"),
        ([*FILES, "--rule", "ema", *OUT], "one of uniform, exponential, polynomial, power"),
        ([*FILES, "--rule", "exponential", *OUT], "needs `--decay`. Try --decay 0.9."),
        ([*FILES, "--rule", "exponential", "--decay", "1", *OUT], "in [0, 1)"),
        ([*FILES, "--rule", "power", "--gamma", "-1", *OUT], "at least 0"),
        ([*FILES, "--rule", "power", "--decay", "0.9", *OUT], "`--decay` is no option of --rule"),
        ([*FILES, "--decay", "0.9", *OUT], "`--decay` is no option of --rule uniform"),
        (["run", *OUT], "with --last or --best. For all files in it name run/*."),
        (["run", FILES[0], "--last", "2", *OUT], "it must be the only input"),
        (["run", "--last", "1", *OUT], "at least 2"),
        (["run", "--last", "4", *OUT], "but there are 3"),
        (["run", "--last", "2", "--best", "2", *OUT], "exclude each other"),
        (["run", "--best", "2", *OUT], "belong together"),
        (["run", "--best", "2", "--by", "history.csv:loss", *OUT], "belong together"),
        ([*FILES, "--mode", "min", *OUT], "belong together"),
        (["run", "--best", "2", "--by", "history.csv", "--mode", "min", *OUT], "FILE.csv:COLUMN"),
        (["run", "--best", "2", "--by", "history.csv:loss", "--mode", "up", *OUT], "min or max"),
        (
            ["run", "--best", "2", "--by", "history.csv:acc", "--mode", "max", *OUT],
            "no column 'acc'",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(folder, capfd, arguments, expected):
    before = sorted(folder.rglob("*"))
    assert cli.main(["average", *arguments]) == 2
    output, complaint = capfd.readouterr()
    assert output == ""
    assert complaint.startswith("Error: ")
    assert complaint.count("\n") == 1
    assert expected in complaint
    assert sorted(folder.rglob("*")) == before


def run_process(folder, program, **options):
    root = str(pathlib.Path(polyak_model.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
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


@pytest.mark.processes
def test_a_bar_is_drawn_only_on_a_terminal_and_only_after_a_while(folder):
    def shown(patience):
        program = (
            "from polyak_model.cli import app as cli, average\n"
            f"average._PATIENCE_SECONDS = {patience}\n"
            f"assert cli.main(['average', *{FILES}, '-o', 'out.weights.h5']) == 0"
        )
        terminal, ours = pty.openpty()
        run_process(folder, program, stderr=ours, stdout=subprocess.DEVNULL)
        os.write(ours, b"end")
        os.close(ours)
        text = os.read(terminal, 10**5).decode()
        os.close(terminal)
        return text

    assert shown(patience=60) == "end"
    assert "Averaging" in shown(patience=0)
    assert "100%" in shown(patience=0)


def test_the_help_shows_every_option():
    text = CliRunner().invoke(cli.build_app(), ["average", "--help"]).stdout
    for option in ("--output", "--weights", "--rule", "--decay", "--last", "--best", "--by"):
        assert option in text


def test_the_same_arguments_give_the_same_bytes(folder):
    averaged(*FILES)
    first = pathlib.Path("out.weights.h5").read_bytes()
    averaged(*FILES)
    assert pathlib.Path("out.weights.h5").read_bytes() == first
