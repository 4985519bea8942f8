import pathlib
import shutil

import keras
import numpy as np
import pytest
from wrappers import make_wrapper

OFFSETS = {"a": 1.0, "b": -1.25, "c": 8.0}
X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
TRUTH = np.array([[1.0], [2.0], [3.0]], "float32")


def make_line(compiled=True, norm=False):
    """Builds a model whose error is 0 at the weights `TRUTH`."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    if norm:
        model.add(keras.layers.BatchNormalization())
    if compiled:
        model.compile("adam", loss="mse", metrics=["mae"], run_eagerly=True)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model, candidates whose weights are off the truth, and data."""
    folder = tmp_path_factory.mktemp("files")
    model = make_line()
    model.save(folder / "model.keras")
    for name, offset in OFFSETS.items():
        model.set_weights([TRUTH + offset])
        model.save_weights(folder / f"{name}.weights.h5")
        model.save(folder / f"{name}.keras")
    np.savez(folder / "data.npz", x=X, y=X @ TRUTH)
    make_line(compiled=False).save(folder / "uncompiled.keras")
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]).save(folder / "other.keras")
    lambdas = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x)])
    lambdas.add(keras.layers.Dense(1, use_bias=False))
    lambdas.save(folder / "lambda.keras")
    lambdas.save_weights(folder / "lambda.weights.h5")
    make_wrapper("functional").save(folder / "wrapper.keras")
    return folder


@pytest.fixture(autouse=True)
def files(saved, tmp_path):
    """Copies the files to the working directory."""
    for path in saved.iterdir():
        shutil.copy(path, tmp_path)


CANDIDATES = ["c.weights.h5", "b.keras", "a.weights.h5"]
OPTIONS = ["--data", "data.npz", "-o", "out.keras"]


def test_the_soup_is_the_average_of_the_candidates_that_make_it_no_worse(run):
    text = run("soup", "model.keras", *CANDIDATES, *OPTIONS)
    rows = [line.split() for line in text.splitlines()[:4]]
    assert rows[0] == ["candidate", "loss", "soup", "with", "it", "kept"]
    assert [row[0] for row in rows[1:]] == ["a.weights.h5", "b.keras", "c.weights.h5"]
    assert [row[-1] for row in rows[1:]] == ["yes", "yes", "no"]
    loaded = keras.models.load_model("out.keras")
    np.testing.assert_array_equal(loaded.get_weights()[0], TRUTH - np.float32(0.125))
    loss, _ = loaded.evaluate(X, X @ TRUTH, verbose=0)
    alone = rows[1][1]
    assert float(rows[2][2]) == float(f"{loss:.5g}") < float(alone)
    assert (
        f"The soup of 2 of 3 candidates: loss {loss:.5g}. The best candidate alone: {alone}."
        in text
    )
    assert text.endswith("\nWritten: out.keras\n")
    assert "BatchNormalization" not in text


def test_weights_alone_are_written(run):
    run("soup", "model.keras", *CANDIDATES, "--data", "data.npz", "--output", "out.weights.h5")
    model = make_line(compiled=False)
    model.load_weights("out.weights.h5")
    np.testing.assert_array_equal(model.get_weights()[0], TRUTH - np.float32(0.125))


def test_the_mode_can_be_given(run):
    text = run("soup", "model.keras", *CANDIDATES, *OPTIONS, "--metric", "mae", "--mode", "max")
    assert [line.split()[-1] for line in text.splitlines()[1:4]] == ["yes", "no", "no"]
    assert text.splitlines()[1].startswith("c.weights.h5")


def test_the_batch_normalization_hint_is_printed_for_an_average_only(run):
    model = make_line(norm=True)
    for name in ("norm.keras", "one.keras", "two.keras"):
        model.save(name)
    text = run("soup", "norm.keras", "one.keras", "two.keras", *OPTIONS)
    assert (
        "BatchNormalization: the averaged statistics of layers/batch_normalization do not" in text
    )
    assert "BatchNormalization" not in run("soup", "norm.keras", "one.keras", *OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.keras", *OPTIONS], "Missing argument 'CANDIDATES'"),
        (["a.weights.h5", "a.keras", *OPTIONS], "`MODEL.keras` must be named *.keras. Received"),
        (
            ["model.keras", "data.npz", *OPTIONS],
            "`CANDIDATES` must be named *.weights.h5 or *.keras.",
        ),
        (["model.keras", "none.keras", *OPTIONS], "'none.keras' does not exist"),
        (["model.keras", "a.keras", "./a.keras", *OPTIONS], "Two of the files are the same one"),
        (["model.keras", "a.keras", "other.keras", *OPTIONS], "'other.keras'"),
        (
            ["model.keras", "wrapper.keras", *OPTIONS],
            "the file of a PolyakModel, which contains two models",
        ),
        (
            ["wrapper.keras", "a.keras", *OPTIONS],
            "Extract one of them first: polyak-model extract",
        ),
        (
            ["lambda.keras", "lambda.weights.h5", *OPTIONS],
            "'lambda.keras': it needs a layer Lambda",
        ),
        (["model.keras", "a.keras", *OPTIONS, "-o", "a.keras"], "'a.keras'"),
        (["model.keras", "a.keras", *OPTIONS, "-o", "model.keras"], "it is one of the files"),
        (["model.keras", "a.keras", *OPTIONS, "-o", "out.h5"], "'out.h5': its name must end in"),
        (["model.keras", "a.keras", *OPTIONS, "-o", "folder"], "'folder': it is a folder"),
        (["model.keras", "a.keras", *OPTIONS, "-o", "no/out.keras"], "its folder does not exist"),
        (
            ["model.keras", "a.keras", *OPTIONS, "--mode", "best"],
            "'best' is not one of 'min', 'max'",
        ),
        (
            ["model.keras", "a.keras", *OPTIONS, "--batch-size", "0"],
            "Invalid value for '--batch-size'",
        ),
        (["model.keras", "a.keras", *OPTIONS, "--metric", "best"], "`--metric` must be one of"),
        (["model.keras", "a.keras", *OPTIONS, "--metric", "TruePositives"], "Add --mode max or"),
        (
            ["model.keras", "a.keras", *OPTIONS, "--data", "none.npz"],
            "'none.npz' does not exist",
        ),
        (["model.keras", "a.keras", *OPTIONS, "--data", "odd.npz"], "on the arrays of `--data`"),
        (["uncompiled.keras", "a.keras", *OPTIONS], "the model was saved without being compiled"),
        (["model.keras", "nan.keras", *OPTIONS], "must have a score other than NaN"),
    ],
)
def test_unusable_input_is_refused(refused, arguments, expected):
    pathlib.Path("folder").mkdir()
    np.savez("odd.npz", x=X[:, :2], y=X @ TRUTH)
    model = make_line()
    model.set_weights([TRUTH + np.nan])
    model.save("nan.keras")
    assert expected in refused("soup", *arguments)


def test_a_full_disk_is_reported_in_one_line(refused, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    pathlib.Path("out.keras").write_text("before")
    monkeypatch.setattr(keras.Model, "save", fail)
    line = refused("soup", "model.keras", "a.keras", *OPTIONS)
    assert "Cannot write 'out.keras': No space left on device" in line
