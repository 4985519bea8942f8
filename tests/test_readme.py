import pathlib
import re
import subprocess

README = pathlib.Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_python_block_runs_after_those_before_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    history = names["history"]
    assert "val_raw_loss" in history
    assert "val_ensemble_mae" in history
    assert (tmp_path / "average.keras").exists()


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
