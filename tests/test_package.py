import pathlib
import subprocess
import sys

import pytest

import polyak_model


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
def test_classes_are_registered_when_keras_came_first_or_a_class_was_imported():
    registered = "print('polyak_model>PolyakModel' in keras.saving.get_custom_objects())"
    assert run(f"import keras; import polyak_model; {registered}").endswith("True")
    assert run(f"from polyak_model import PolyakModel; import keras; {registered}").endswith("True")
