import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_readme_links_to_every_notebook():
    linked = re.findall(r"\(notebooks/(\w+)\.ipynb\)", (ROOT / "README.md").read_text("utf-8"))
    assert linked == [path.stem for path in NOTEBOOKS]


@pytest.mark.benchmarks
def test_a_notebook_runs_without_error_and_leaves_no_files(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_is_committed_as_run_once_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_a_notebook_is_committed_with_a_plot(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_committed_notebook_contains_no_warnings_and_no_absolute_paths(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"(^|[\s'\"])(/[\w.-]+/|[A-Z]:\\)", text)


def test_every_test_that_a_notebook_names_exists(notebook):
    text = "".join(cell.source for cell in notebook.cells)
    for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert f"\ndef {name}(" in (ROOT / path).read_text("utf-8"), name
