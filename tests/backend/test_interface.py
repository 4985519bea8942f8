import importlib
import inspect
import pkgutil
import subprocess
import sys

import keras
import pytest

from polyak_model import backend
from polyak_model.backend import interface

BACKENDS = [module.name for module in pkgutil.iter_modules(backend.__path__) if module.ispkg]
NAMES = [(module, name) for module, names in interface.MODULES.items() for name in names]


def public(module):
    """Returns the functions and classes that a module defines."""
    defined = {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
    }
    return {name: value for name, value in defined.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("module", "member"), NAMES)
def test_each_backend_provides_the_interface_with_its_signatures(name, module, member):
    pytest.importorskip(name)
    implementation = importlib.import_module(f"{backend.__name__}.{name}.{module}")
    expected, received = getattr(interface, member), getattr(implementation, member)
    if inspect.isclass(expected):
        bases = {base.__name__ for base in received.__mro__}
        assert {base.__name__ for base in expected.__mro__} <= bases
    else:
        expected = inspect.signature(expected).parameters.values()
        received = inspect.signature(received).parameters.values()
        assert [(p.name, p.kind, p.default) for p in received] == [
            (p.name, p.kind, p.default) for p in expected
        ]


def test_the_interface_lists_and_documents_all_that_it_defines():
    defined = public(interface)
    assert {*defined} - {"Pair"} == {name for _, name in NAMES}
    assert all(inspect.getdoc(member) for member in defined.values())


def test_the_current_backend_is_exposed():
    folder = importlib.import_module(f"{backend.__name__}.{keras.backend.backend()}")
    for module, name in NAMES:
        implementation = importlib.import_module(f"{folder.__name__}.{module}")
        assert getattr(backend, name) is getattr(implementation, name)


def test_a_backend_that_is_not_supported_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "_current", backend._current)  # Importing it anew replaces that.
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ImportError) as refusal:
        importlib.reload(backend)
    said = str(refusal.value)
    assert f"runs on these backends of Keras: {', '.join(BACKENDS)}. Received" in said
    assert "the backend 'numpy'. Set the environment variable KERAS_BACKEND=" in said


@pytest.mark.processes
def test_only_the_current_backend_is_imported():
    imported = "{'jax', 'tensorflow', 'torch'} & {*sys.modules}"
    code = f"import sys; from polyak_model import PolyakModel; print({imported})"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"{ {keras.backend.backend()} }\n"
