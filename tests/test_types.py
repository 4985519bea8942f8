"""Type hints: what a type checker finds in the code of a user."""

import pathlib
import re
import subprocess
import sys

import pytest

import polyak_model

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).parents[1]
GOOD = """
import keras
import numpy as np
from polyak_model import *
from polyak_model import checkpoints, snapshots, soups

inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
rules = {"short": 0.9, "long": PowerAverage.from_relative_width(0.1, update_every=2)}
model = PolyakModel(inner, UniformAverage(start_step=5), report=("average", "raw"), name="wrapper")
model.compile(optimizer="adam", loss="mse")
model.fit(np.ones((8, 3)), np.ones((8, 1)), epochs=2, callbacks=[AverageMonitor(every=10)])
model.predict(np.ones((8, 3)), using="raw", verbose=0)
model.inference = "ensemble"
age: float = model.rule.mean_age(model.average_step)
ages: np.ndarray = ExponentialAverage(0.9).mean_age(np.arange(9))
rule: ExponentialAverage = ExponentialAverage.from_half_life(epochs=1, steps_per_epoch=312)
refresh_statistics(clone_model(model.average_model), np.ones((8, 3)), batch_size=4)
result = checkpoints.average_files(["a.keras", "b.keras"], "c.keras", weights=[1, 2])
error: float = snapshots.rebuild("folder", PowerAverage()).walk_error
share: float = result.shares[0] * rescale_decay(0.999, 4)
"""
# Wrong lines, each with a part of what is reported.
WRONG = {
    "PolyakModel(inner, averge=0.9)": 'Unexpected keyword argument "averge"',
    "PolyakModel(inner, average='0.9')": 'has incompatible type "str"',
    "model.set_rule('short', decay=0.9)": 'Unexpected keyword argument "decay"',
    "model.predict(inner, using=3)": 'has incompatible type "int"',
    "model.predict(inner, useing='raw')": 'Unexpected keyword argument "useing"',
    "model.evaluate(inner, using=3)": 'has incompatible type "int"',
    "model.inference = 3": 'expression has type "int"',
    "model.rule = '0.9'": 'expression has type "str"',
    "AverageSnapshots('folder', evry=3)": 'Unexpected keyword argument "evry"',
    "snapshots.rebuild('folder', UniformAverage(), liek='a.keras')": 'argument "liek"',
    "PolyakModle(inner)": 'Name "PolyakModle" is not defined',
    "polyak_model.UnifromAverage()": 'Module has no attribute "UnifromAverage"',
    "ExponentialAverage(dekay=0.9)": 'Unexpected keyword argument "dekay"',
    "ExponentialAverage.from_half_life(100, start_stp=3)": 'keyword argument "start_stp"',
    "ExponentialAverage('0.9')": 'expected "float"',
    "PowerAverage(eta=3)": 'Unexpected keyword argument "eta"',
    "PolynomialAverage(3).mean_ages(3)": 'has no attribute "mean_ages"',
    "AverageCheckpoint('a.keras', save_best=True)": 'keyword argument "save_best"',
    "AverageMonitor(evry=3)": 'Unexpected keyword argument "evry"',
    "clone_model(inner, clone_function=3)": 'has incompatible type "int"',
    "refresh_statistics(inner, inner, batchsize=3)": 'keyword argument "batchsize"',
    "checkpoints.average_files('a.keras', 'b.keras', wieghts=[1])": 'argument "wieghts"',
}


def check(folder, text):
    """Returns the errors that mypy reports in the code of a user, by line."""
    (folder / "user.py").write_text(text)
    # Outside of the package, whose settings are not those of a user.
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--no-error-summary"]
    done = subprocess.run(
        [*command, "--config-file=", f"--cache-dir={folder / 'cache'}", "user.py"],
        cwd=folder,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"user\.py:\d+: error", line)]
    return {int(line.split(":")[1]): line for line in lines}


def test_what_is_written_correctly_is_accepted_and_each_misspelling_is_found(tmp_path):
    good = GOOD + "import polyak_model\n"
    count = len(good.splitlines())
    reports = check(tmp_path, good + "\n".join(WRONG))
    found = {text: reports.pop(count + i, "") for i, text in enumerate(WRONG, 1)}
    assert reports == {}
    assert {text: report for text, report in found.items() if WRONG[text] not in report} == {}


def test_the_package_says_that_it_has_types():
    assert pathlib.Path(polyak_model.__file__).with_name("py.typed").is_file()
