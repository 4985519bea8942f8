import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

import polyak_model

ROOT = pathlib.Path(__file__).parents[1]


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_everything_exported_can_be_reached_and_is_listed():
    for name in polyak_model.__all__:
        assert getattr(polyak_model, name).__name__ == name
        assert name in dir(polyak_model)


def test_the_version_is_that_of_the_citation():
    text = (pathlib.Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {polyak_model.__version__}\n" in text


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(polyak_model, "SwapModel")


@pytest.mark.processes
def test_importing_the_package_does_not_import_keras():
    assert run("import sys, polyak_model; print('keras' in sys.modules)") == "False"


@pytest.mark.processes
def test_a_source_distribution_contains_all_tests_and_what_they_read(tmp_path):
    made_here = shutil.ignore_patterns(
        ".*cache", ".git", ".hypothesis", ".venv", "__pycache__", "*.egg-info", "build"
    )
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=made_here)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (archive,) = tmp_path.glob("polyak_model-*.tar.gz")
    with tarfile.open(archive) as file:
        # All names begin with the name of the archive.
        packed = {name.partition("/")[2] for name in file.getnames()}
    folders = ("benchmarks", "notebooks", "polyak_model", "tests")
    paths = [path for folder in folders for path in (source / folder).rglob("*") if path.is_file()]
    assert len(paths) > 100
    expected = {path.relative_to(source).as_posix() for path in paths}
    assert expected | {".ci/run", "README.md", "setup.cfg", "pyproject.toml"} <= packed


@pytest.mark.processes
def test_classes_are_registered_when_keras_came_first_and_it_names_their_module_before():
    path = str(ROOT / "tests" / "formats" / "format-2.keras")
    script = f"""
import keras

try:
    keras.models.load_model({path!r})
except TypeError as error:
    print(error)
import polyak_model

print("polyak_model>PolyakModel" in keras.saving.get_custom_objects())
print(type(keras.models.load_model({path!r})).__name__)
"""
    *refusal, registered, loaded = run(script).splitlines()
    assert "make sure they are all imported" in "\n".join(refusal)
    assert "'module': 'polyak_model.model'" in "\n".join(refusal)
    assert (registered, loaded) == ("True", "PolyakModel")
