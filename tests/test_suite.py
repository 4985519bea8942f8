"""The suite itself: what its tests may import and cost."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

TESTS = pathlib.Path(__file__).parent
# Tests of what needs no Keras.
PLAIN = [
    *("weight_files", "test_checkpoints.py", "test_errors.py", "test_rules.py", "test_shares.py"),
    *("test_soups.py", "saving/test_checkpoint_history.py", "cli/test_average.py"),
]


def run_pytest(folder, plugin, *arguments):
    (folder / "plugin.py").write_text(plugin)
    paths = [folder, TESTS, TESTS / "helpers", TESTS.parent]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "plugin", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_plain_tests_import_neither_keras_nor_tensorflow(tmp_path):
    plugin = """
import sys
def pytest_unconfigure():
    print({"keras", "tensorflow"} & set(sys.modules))
"""
    # The files are all collected; to run some of their tests is enough.
    paths = [str(TESTS / name) for name in PLAIN]
    output = run_pytest(tmp_path, plugin, *paths, "-m", "quick", "-k", "refused")
    assert " passed" in output
    assert output.endswith("set()\n")


def test_a_test_that_takes_long_fails_unless_its_cost_is_marked(tmp_path):
    (tmp_path / "test_costs.py").write_text(
        "import pytest\ndef test_unmarked(): pass\n@pytest.mark.slow\ndef test_marked(): pass\n"
    )
    plugin = """
import conftest
conftest.LIMIT = -1
from conftest import pytest_runtest_call
"""
    output = run_pytest(tmp_path, plugin, str(tmp_path))
    assert "Failed: took 0 s of CPU time: mark its cost" in output
    assert "test_costs.py::test_unmarked" in output
    assert "1 failed, 1 passed" in output
