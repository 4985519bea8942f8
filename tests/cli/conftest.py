import pathlib

import pytest

from polyak_model.cli import app as cli


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def read_folder():
    return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


@pytest.fixture
def run(capfd):
    """Runs a command and returns what it prints."""

    def run(*arguments):
        assert cli.main(list(map(str, arguments))) == 0
        return capfd.readouterr().out

    return run


@pytest.fixture
def refused(capfd):
    """Runs a command and returns its one line on stderr; no file may have changed."""

    def refused(*arguments):
        before = read_folder()
        capfd.readouterr()
        assert cli.main(list(map(str, arguments))) == 2
        output, complaint = capfd.readouterr()
        assert output == ""
        (line,) = [line for line in complaint.splitlines() if line.startswith("Error: ")]
        assert line == complaint.splitlines()[-1]
        assert read_folder() == before
        return line

    return refused
