import os
import pathlib
import shutil

import h5py
import keras
import numpy as np
import pytest
import safetensors.numpy
from wrappers import INPUTS, make_wrapper


@pytest.fixture(scope="module")
def wrapper():
    """A wrapper."""
    return make_wrapper("sequential")


@pytest.fixture(scope="module")
def saved(wrapper, tmp_path_factory):
    """A folder with the files of a wrapper."""
    folder = tmp_path_factory.mktemp("files")
    wrapper.save(folder / "wrapper.keras")
    wrapper.save_weights(folder / "wrapper.weights.h5")
    return folder


@pytest.fixture(autouse=True)
def files(saved, tmp_path):
    """Copies the files to the working directory."""
    for path in saved.iterdir():
        shutil.copy(path, tmp_path)


@pytest.mark.parametrize(
    ("options", "route"),
    [([], "average"), (["--contents", "average"], "average"), (["--contents", "raw"], "raw")],
)
def test_the_written_model_predicts_as_the_route_does(wrapper, run, options, route):
    assert run("extract", "wrapper.keras", *options, "-o", "out.keras") == "Written: out.keras\n"
    loaded = keras.models.load_model("out.keras")
    np.testing.assert_array_equal(
        loaded.predict(INPUTS, verbose=0), wrapper.predict(INPUTS, verbose=0, using=route)
    )


@pytest.mark.parametrize("source", ["wrapper.keras", "wrapper.weights.h5"])
def test_the_written_weights_are_those_of_the_model(wrapper, run, source):
    run("extract", source, "--contents", "raw", "--output", "out.weights.h5")
    weights = pathlib.Path("out.weights.h5")
    model = keras.models.clone_model(wrapper.raw_model)
    model.load_weights(weights)
    for array, original in zip(model.get_weights(), wrapper.raw_model.get_weights(), strict=True):
        np.testing.assert_array_equal(array, original)


def test_quiet_prints_nothing(run):
    assert run("extract", "wrapper.keras", "-o", "out.keras", "--quiet") == ""


def test_an_existing_file_is_replaced(run):
    pathlib.Path("out.keras").write_text("before")
    run("extract", "wrapper.keras", "-o", "out.keras")
    assert keras.models.load_model("out.keras").built


@pytest.mark.parametrize("contents", ["average", "raw"])
@pytest.mark.parametrize("source", ["wrapper.keras", "wrapper.weights.h5"])
def test_safetensors_have_the_weights_by_path_and_no_optimizer(run, source, contents):
    run("extract", source, "--contents", contents, "-o", "out.safetensors")
    run("extract", source, "--contents", contents, "-o", "out.weights.h5")
    tensors = safetensors.numpy.load_file("out.safetensors")
    assert tensors
    with h5py.File("out.weights.h5") as file:
        for name, array in tensors.items():
            np.testing.assert_array_equal(array, file[name])
    assert not [name for name in tensors if "optimizer" in name]
    assert '"variables"' in run("inspect", "out.safetensors", "--json")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["wrapper.keras"], "Missing option '--output'"),
        (
            ["wrapper.keras", "-o", "out.h5"],
            ".weights.h5 or .safetensors. Choose",
        ),
        (
            ["wrapper.weights.h5", "-o", "out.keras"],
            ".weights.h5 or .safetensors. Choose",
        ),
        (["wrapper.keras", "-o", "no/out.keras"], "its folder does not exist"),
        (["wrapper.keras", "-o", "wrapper.keras"], "it is one of the files to read"),
        (["wrapper.keras", "-o", "./link.keras"], "it is one of the files to read"),
        (["wrapper.keras", "-o", "folder"], "'folder': it is a folder"),
        (
            ["wrapper.keras", "-o", "a.keras", "--contents", "both"],
            "it contains no average called 'both'. Its contents are average, raw",
        ),
        (["none.keras", "-o", "out.keras"], "'none.keras' does not exist"),
        (["broken.csv", "-o", "out.keras"], "its name must end in one of"),
        (
            ["plain.weights.h5", "-o", "out.weights.h5"],
            "'plain.weights.h5': it contains no average",
        ),
        (["broken.keras", "-o", "out.keras"], "'broken.keras'"),
    ],
)
def test_unusable_input_is_refused(refused, arguments, expected):
    os.symlink("wrapper.keras", "link.keras")
    os.mkdir("folder")
    with h5py.File("plain.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = 1.0
    content = pathlib.Path("wrapper.keras").read_bytes()
    pathlib.Path("broken.keras").write_bytes(content[: len(content) // 2])
    pathlib.Path("broken.csv").write_text("no weights")
    assert expected in refused("extract", *arguments)


def test_a_folder_that_is_not_writable_is_refused(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "its folder is not writable" in refused("extract", "wrapper.keras", "-o", "out.keras")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("full")])
def test_a_failure_to_write_is_reported_in_one_line(refused, monkeypatch, failure):
    def fail(*arguments):
        raise failure

    monkeypatch.setattr("polyak_model.saving.extraction.create_groups", fail)
    line = refused("extract", "wrapper.keras", "-o", "out.keras")
    assert str(failure.args[-1]) in line
