import csv
import shutil

import keras
import numpy as np
import pytest

from polyak_model import AverageSnapshots, PolyakModel, PowerAverage

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(400, 4)).astype("float32")
Y = (X @ [[1.0], [-1.0], [2.0], [0.5]] + GENERATOR.normal(size=(400, 1))).astype("float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the snapshots of a training, its model and data."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    inner = keras.Sequential(
        [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model = PolyakModel(inner, average=PowerAverage.from_relative_width(0.08))
    model.compile(keras.optimizers.SGD(0.05), loss="mse")
    snapshots = AverageSnapshots(folder / "run")
    model.fit(X[:300], Y[:300], batch_size=2, epochs=2, callbacks=[snapshots], verbose=0)
    model.average_model.save(folder / "model.keras")
    np.savez(folder / "held-out.npz", x=X[300:], y=Y[300:])
    np.savez(folder / "training.npz", x=X[:300])
    np.savez(folder / "wrong.npz", x=X[:300, :2])
    return folder


@pytest.fixture(autouse=True)
def files(working_folder, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


OPTIONS = ["--data", "held-out.npz", "--like", "model.keras"]
WIDTHS = ["--relative-widths", 0.01, 0.05, 0.1, 0.2]


def test_the_scores_are_printed_and_the_best_is_written(run):
    outputs = ["-o", "best.keras", "--table", "sweep.csv", "--plot", "sweep.png"]
    text = run("sweep", "run", *WIDTHS, "--half-lives", 30, *OPTIONS, *outputs)
    header, *rows = [line.split("  ") for line in text.splitlines()[:6]]
    assert [name.strip() for name in header if name] == [
        "average",
        "step",
        "loss",
        "± error",
        "walk error",
        "profile error",
        "rounding",
    ]
    assert [row[0] for row in rows[:4]] == [f"power, relative width {w}" for w in WIDTHS[1:]]
    assert rows[4][0].startswith("exponential, decay 0.97")
    loaded = keras.models.load_model("best.keras")
    best = loaded.evaluate(X[300:], Y[300:], verbose=0)
    assert f", at step 300, loss {best:.5g}." in text
    assert "Not scored, since the walk error exceeds --max-error: 1." in text
    assert "within one standard error of it: on this much data the choice between them is" in text
    assert "The snapshots are of a single average." in text
    assert "BatchNormalization: the averaged statistics" in text
    assert text.endswith("Written: best.keras\nWritten: sweep.csv\nWritten: sweep.png\n")
    with open("sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert min(float(row["loss"]) for row in table if row["loss"]) == pytest.approx(best, rel=1e-5)
    assert [bool(row["loss"]) for row in table] == [False, True, True, True, True]
    with open("sweep.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_several_steps_are_swept(run):
    text = run("sweep", "run", "--decays", 0.97, "--steps", 256, 300, *OPTIONS)
    assert [line.split()[3] for line in text.splitlines()[1:3]] == ["256", "300"]


@pytest.mark.parametrize("command", ["sweep", "rebuild"])
def test_statistics_are_refreshed(run, command):
    if command == "sweep":
        arguments = ["--relative-widths", 0.1, "--data", "held-out.npz"]
    else:
        arguments = ["--relative-width", 0.1]
    arguments += ["--like", "model.keras", "--refresh", "training.npz"]
    text = run(command, "run", *arguments, "-o", "out.keras")
    assert "BatchNormalization" not in text
    norm = keras.models.load_model("out.keras").layers[0]
    np.testing.assert_allclose(norm.moving_mean, X[:300].mean(0), atol=1e-6)
    run(command, "run", *arguments, "-o", "out.weights.h5", "--quiet")
    model = keras.models.load_model("out.keras")
    expected = model.get_weights()
    model.load_weights("out.weights.h5")
    for one, other in zip(expected, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Received: none. Try --relative-widths 0.05 0.1 0.2."),
        (["--relative-widths", "wide"], "The lengths must be numbers. Received: wide."),
        (["--relative-widths", 0.9], "`--relative-width` is out of range"),
        (["--decays", 0.97, "--steps", 10.5], "`--steps` must be integers. Received: 10.5."),
        (["--relative-widths", 0.01], "None of the 1 averages can be rebuilt"),
        (["--decays", 0.97, "--table", "a.txt"], "its name must end in .csv"),
        (["--decays", 0.97, "--metric", "wrong"], "`--metric` must be"),
        (["--decays", 0.97, "--refresh", "wrong.npz"], "Cannot refresh the statistics"),
        (["--decays", 0.97, "--refresh", "model.keras"], "`--refresh` must be an .npz file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(refused, arguments, expected):
    assert expected in refused("sweep", "run", *arguments, *OPTIONS)
