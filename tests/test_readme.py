import os
import pathlib
import re
import subprocess
import sys

import pytest

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
(COMMANDS,) = re.findall(r"<!-- file commands -->\n```bash\n(.*?)```", TEXT, flags=re.DOTALL)
SCRIPT = "\n".join(
    [
        *BLOCKS,
        'assert "val_raw_loss" in history',
        'assert "val_ensemble_mae" in history',
        'print("all ran")',
    ]
)


def run(command, folder):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
def test_python_blocks_run_in_order_and_then_the_file_commands(tmp_path):
    assert len(BLOCKS) >= 4
    assert run([sys.executable, "-c", SCRIPT], tmp_path).strip().endswith("all ran")
    assert (tmp_path / "average.keras").exists()
    run(["bash", "-ec", COMMANDS], tmp_path)
    outputs = re.findall(r"-o (\S+)", COMMANDS)
    assert len(outputs) >= 4
    for output in outputs:
        assert (tmp_path / output).exists()


def test_it_has_at_most_150_lines_and_code_to_run_within_the_first_34():
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert lines.index("```python") < 34


@pytest.mark.processes
def test_ci_runs_the_test_command():
    command = r"/^<!-- test command -->$/,/^```$/{/^<!--/d;/^```/d;p}"
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    found = subprocess.run(
        ["sed", "-n", command, str(README)], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == ['pip install -e ".[test]" && python -m pytest']


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_to_files(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_benchmarks_and_tests_named_in_the_documents_exist():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\b(?:benchmarks|notebooks|tests)/[\w/]+\.\w+", text):
            assert (ROOT / target).exists(), target


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
def test_weights_in_the_table_of_rules_are_those_of_the_rules(formula):
    rule, weight = WEIGHTS[formula]
    (row,) = [line for line in TEXT.splitlines() if f"| {formula} |" in line]
    assert type(rule).__name__ in row
    for step in (1, 2, 10, 500):
        assert rule.weight(step) == pytest.approx(weight(step), rel=1e-12)
