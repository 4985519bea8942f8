import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import polyak_model
from polyak_model.cli import app as cli

FILES = ["average.keras", "history.csv", "history.png"]


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A file of tiny images, in the working directory."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), "uint8")
    np.savez("images.npz", x=x, y=np.arange(40) % 2)
    return tmp_path / "images.npz"


@pytest.fixture
def refused(images, capfd):
    """Runs a command and returns its one line on stderr; nothing may have been written."""

    def refused(*arguments):
        assert cli.main(list(map(str, arguments))) == 2
        output, complaint = capfd.readouterr()
        assert output == ""
        assert complaint.startswith("Error: ")
        assert complaint.count("\n") == 1
        assert list(images.parent.iterdir()) == [images]
        return complaint

    return refused


def run_process(folder, *command):
    root = pathlib.Path(polyak_model.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_the_demo_prints_the_table_and_names_the_files_it_wrote(images, capfd):
    assert cli.main(["demo", "--data", "images.npz", "--epochs", "1", "--output", "a/b"]) == 0
    output = capfd.readouterr().out
    assert "Epoch 1/1" not in output.split("On 8 held-out images")[1]
    lines = output.splitlines()
    table = lines.index("route       loss  accuracy")
    assert [line.split()[0] for line in lines[table + 1 : table + 4]] == [
        "raw",
        "average",
        "ensemble",
    ]
    assert lines[-3:] == [f"  {pathlib.Path('a/b', name)}" for name in FILES]
    assert sorted(path.name for path in pathlib.Path("a/b").iterdir()) == FILES


def test_an_existing_folder_is_written_to_and_old_results_are_replaced(images, capfd):
    pathlib.Path("results").mkdir()
    pathlib.Path("results", "history.csv").write_text("old")
    pathlib.Path("results", "notes.txt").write_text("kept")
    assert cli.main(["demo", "--data", "images.npz", "--output", "results", "--epochs", "1"]) == 0
    assert pathlib.Path("results", "history.csv").read_text().startswith("epoch,loss")
    assert pathlib.Path("results", "notes.txt").read_text() == "kept"


@pytest.mark.processes
def test_the_module_runs_as_a_command_and_writes_text_without_control_characters_to_a_pipe(images):
    result = run_process(images.parent, "-m", "polyak_model", "demo", "--data=images.npz")
    assert result.returncode == 0
    assert "Epoch 8/8" in result.stdout
    assert "exponential average with decay 0.99, seed 0" in result.stdout
    assert result.stdout.replace("\n", "").isprintable()
    assert sorted(path.name for path in (images.parent / "polyak-demo").iterdir()) == FILES


@pytest.mark.processes
def test_a_missing_file_is_reported_in_one_line_and_nothing_is_written(tmp_path):
    result = run_process(tmp_path, "-m", "polyak_model", "demo", "--data", "nowhere.npz")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "Invalid value for '--data': " in line
    assert "'nowhere.npz' does not exist. See polyak-model demo --help" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [["--data", "nowhere.npz"], ["--decay", "2"]])
def test_bad_input_is_reported_before_keras_is_imported(tmp_path, arguments):
    program = (
        "import sys; from polyak_model.cli.app import main; code = main(sys.argv[1:]); "
        "print(sorted({'keras', 'tensorflow'} & set(sys.modules)), code)"
    )
    assert run_process(tmp_path, "-c", program, "demo", *arguments).stdout == "[] 2\n"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--decay", "1", "must be in [0, 1). Received: 1.0. Try --decay 0.9."),
        ("--decay", "-0.1", "must be in [0, 1)"),
        ("--decay", "nan", "must be in [0, 1)"),
        ("--learning-rate", "0", "must be positive and finite"),
        ("--learning-rate", "inf", "must be positive and finite"),
    ],
)
def test_an_option_out_of_range_is_refused(refused, option, value, expected):
    assert f"`{option}` {expected}" in refused("demo", f"{option}={value}")


@pytest.mark.parametrize(
    ("option", "value"), [("--epochs", "0"), ("--seed", "-1"), ("--seed", str(2**32))]
)
def test_an_integer_out_of_range_is_refused_with_the_value_received(refused, option, value):
    line = refused("demo", f"{option}={value}")
    assert f"Invalid value for '{option}'" in line
    assert value in line.partition(":")[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--epochs", "many"], "See polyak-model demo --help"),
        (["demo", "--epochs"], "requires an argument"),
        (["demo", "--epoch", "3"], "--epochs"),
        (["demos"], "See polyak-model --help"),
        (["demo", "extra"], "See polyak-model demo --help"),
    ],
)
def test_a_command_that_cannot_be_parsed_is_refused(refused, arguments, expected):
    assert expected in refused(*arguments)


@pytest.mark.parametrize("output", ["images.npz", "images.npz/results"])
def test_an_output_that_is_not_a_folder_is_refused(refused, output):
    line = refused("demo", "--output", output)
    assert f"Received: '{output}', but" in line
    assert "images.npz' is not a folder. Choose another" in line


def test_an_output_that_cannot_be_created_is_refused(refused):
    assert "the system says: File name too long" in refused("demo", "--output", "a" * 300)


def test_a_folder_that_is_not_writable_is_refused(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "is not writable" in refused("demo", "--output", "results")


@pytest.mark.parametrize(
    ("module", "extra"), [("typer", "cli"), ("mlxtend", "demo"), ("matplotlib", "demo")]
)
def test_a_missing_dependency_is_named_with_its_remedy(refused, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    line = refused("demo")
    assert repr(module) in line
    assert f"pip install {module};" in line
    assert f'pip install -e ".[{extra}]"' in line


def test_own_images_need_no_mlxtend(images, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert cli.main(["demo", "--data", "images.npz", "--epochs", "1"]) == 0


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_command_the_commands_are_listed(arguments, capfd):
    assert cli.main(arguments) == 0
    output = capfd.readouterr().out
    for name in ("average", "demo", "extract", "inspect", "soup", "--install-completion"):
        assert f"  {name} " in output


def test_the_version_is_printed(capfd):
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out == f"polyak-model {polyak_model.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("polyak-model in", "inspect"),
        ("polyak-model average --rule po", "polynomial\npower"),
        ("polyak-model average --mode m", "min\nmax"),
    ],
)
def test_commands_and_choices_are_completed(tmp_path, monkeypatch, words, expected):
    monkeypatch.setenv("_POLYAK_MODEL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert run_process(tmp_path, "-m", "polyak_model").stdout.strip() == expected


@pytest.mark.parametrize("command", ["average", "demo", "extract", "soup"])
def test_every_command_that_writes_files_can_be_quiet(command, capfd):
    assert cli.main([command, "--help"]) == 0
    assert "--quiet" in capfd.readouterr().out


def test_a_quiet_demo_prints_nothing(images, capfd):
    assert cli.main(["demo", "--data", "images.npz", "--epochs", "1", "--quiet"]) == 0
    assert capfd.readouterr().out == ""


def test_the_help_shows_every_option_with_its_default():
    text = CliRunner().invoke(cli.build_app(), ["demo", "--help"]).stdout
    for option in ("--epochs", "--decay", "--learning-rate", "--seed", "--output", "--data"):
        assert option in text
    for default in ("8", "0.99", "0.02", "0", "polyak-demo"):
        assert default in text
