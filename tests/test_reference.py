"""The API reference: what it documents, and that it is built without a warning."""

import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

import polyak_model

ROOT = pathlib.Path(__file__).parents[1]


FUNCTIONS = {
    "polyak_model.checkpoints": ["average_files"],
    "polyak_model.snapshots": ["rebuild", "sweep"],
    "polyak_model.soups": ["greedy_soup"],
}


def documented():
    """Yields name and docstring of public functions, classes and methods that Keras lacks."""
    modules = [polyak_model, *(importlib.import_module(name) for name in FUNCTIONS)]
    for module in modules:
        names = FUNCTIONS.get(module.__name__, polyak_model.__all__)
        for name in names:
            item = getattr(module, name)
            yield name, item.__doc__
            for key, member in inspect.getmembers(item) if inspect.isclass(item) else ():
                home = getattr(member, "__module__", None) or ""
                is_ours = home.startswith("polyak_model") and not hasattr(keras.Model, key)
                if is_ours and member.__doc__ and not key.startswith("_"):
                    yield f"{name}.{key}", member.__doc__


def test_every_public_name_and_method_has_an_example():
    documents = dict(documented())
    assert {*polyak_model.__all__, "PolyakModel.set_rule", "Rule.mean_age"} < documents.keys()
    assert not [name for name, document in documents.items() if ">>> " not in (document or "")]


@pytest.mark.processes
def test_it_is_built_without_a_warning_and_has_every_public_name(tmp_path):
    command = re.search(r"`(python docs/\S+) \S+`", (ROOT / "CONTRIBUTING.md").read_text())[1]
    _, script = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / script, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for name in polyak_model.__all__:
        assert f'id="{name}"' in pages["polyak_model.html"]
    for name in ("fit", "evaluate", "predict"):
        assert f'id="RoutedModel.{name}"' in pages["routed_model.html"]
    assert 'id="Training.compile"' in pages["training.html"]
    assert 'id="Building.build"' in pages["building.html"]
    for module, names in FUNCTIONS.items():
        for name in names:
            assert f'id="{name}"' in pages[f"{module.rpartition('.')[2]}.html"]
