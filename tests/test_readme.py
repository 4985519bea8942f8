import os
import pathlib
import re
import subprocess
import sys

import pytest

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage

README = pathlib.Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
(COMMANDS,) = re.findall(r"<!-- file commands -->\n```bash\n(.*?)```", TEXT, flags=re.DOTALL)


CHECKS = """
assert "val_raw_loss" in history
assert "val_ensemble_mae" in history
print("all ran")
"""


@pytest.mark.slow
def test_every_python_block_runs_after_those_before_it_and_then_the_commands(tmp_path):
    assert len(BLOCKS) >= 4
    script = "\n".join([*BLOCKS, CHECKS])
    # In a process of its own: its strategy would get into the way of those of other tests.
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("all ran")
    assert (tmp_path / "average.keras").exists()
    assert (tmp_path / "teacher.keras").exists()
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", COMMANDS],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for output in re.findall(r"-o (\S+)", COMMANDS):
        assert (tmp_path / output).exists()


def test_runnable_code_stands_before_line_35():
    assert TEXT.splitlines().index("```python") < 34


def test_ci_runs_the_test_command_of_the_readme():
    command = r"/^<!-- test command -->$/,/^```$/{/^<!--/d;/^```/d;p}"
    root = README.parent
    assert command in (root / ".ci" / "run").read_text(encoding="utf-8")
    found = subprocess.run(
        ["sed", "-n", command, str(README)], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == ['pip install -e ".[test]" && python -m pytest']


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (README.parent / target).exists(), target


WEIGHTS = {
    "(1 − d) / (1 − dᵗ)": (ExponentialAverage(0.9), lambda t: (1 - 0.9) / (1 - 0.9**t)),
    "1 − d": (ExponentialAverage(0.9, debias=False), lambda t: 1 - 0.9),
    "1 − min(d, t / (9 + t))": (
        ExponentialAverage(0.9, warmup=True),
        lambda t: 1 - min(0.9, t / (9 + t)),
    ),
    "1 / t": (UniformAverage(), lambda t: 1 / t),
    "(η + 1) / (t + η)": (PolynomialAverage(3), lambda t: (3 + 1) / (t + 3)),
    "1 − (1 − 1 / t)^(γ + 1)": (PowerAverage(6.94), lambda t: 1 - (1 - 1 / t) ** (6.94 + 1)),
}


@pytest.mark.parametrize("formula", WEIGHTS)
def test_the_weights_in_the_table_of_rules_are_those_of_the_rules(formula):
    rule, weight = WEIGHTS[formula]
    (row,) = [line for line in TEXT.splitlines() if f"| {formula} |" in line]
    assert type(rule).__name__ in row
    for step in (1, 2, 10, 500):
        assert rule.weight(step) == pytest.approx(weight(step), rel=1e-12)
