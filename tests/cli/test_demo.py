import csv

import keras
import numpy as np
import pytest
from matplotlib.image import imread

from polyak_model.cli.demo import experiment as demo
from polyak_model.cli.demo.images import load_images, split

METRICS = {f"{prefix}{name}" for prefix in demo.PREFIXES.values() for name in ("loss", "accuracy")}


def tiny_images():
    y = np.arange(80) % 2
    noise = np.random.default_rng(0).uniform(size=(80, 8, 8, 1))
    return (noise + y[:, None, None, None]).astype("float32"), y


@pytest.fixture(scope="module")
def trained():
    """A net trained for two epochs on tiny images, and its history."""
    return demo.train(*tiny_images(), epochs=2, decay=0.5, verbose=0)


def test_the_history_has_an_entry_per_epoch_for_each_metric_of_each_route(trained):
    _, history = trained
    assert set(history) == {"loss", "accuracy"} | METRICS
    assert {len(values) for values in history.values()} == {2}


def test_the_table_shows_what_a_fresh_evaluation_measures(trained):
    model, history = trained
    _, (x, y) = split(*tiny_images(), demo.SEED)
    rows = demo.table_rows(history)
    assert [row[0] for row in rows] == ["raw", "average", "ensemble"]
    for route, *shown in rows:
        measured = model.evaluate(x, y, using=route, batch_size=demo.BATCH_SIZE, verbose=0)
        assert shown == [f"{value:.4f}" for value in measured]


def test_the_same_seed_gives_the_same_history(trained):
    _, history = demo.train(*tiny_images(), epochs=2, decay=0.5, verbose=0)
    assert history == trained[1]


def test_another_seed_gives_another_history(trained):
    _, history = demo.train(*tiny_images(), epochs=2, decay=0.5, seed=1, verbose=0)
    assert history["loss"] != trained[1]["loss"]


def test_the_history_is_written_with_float32_precision(trained, tmp_path):
    _, history = trained
    demo.write_history(tmp_path / "history.csv", history)
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("epoch") for row in rows] == ["1", "2"]
    for name, values in history.items():
        written = [float(row[name]) for row in rows]
        np.testing.assert_allclose(written, values, rtol=1e-6)


def test_the_plot_shows_each_route_in_its_color(trained, tmp_path):
    demo.draw_history(tmp_path / "history.png", trained[1], "seed 0")
    pixels = np.round(imread(tmp_path / "history.png")[..., :3] * 255).astype(int)
    for colour in demo.COLOURS.values():
        channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == channels).all(axis=-1).sum() > 100


def test_one_epoch_can_be_plotted(trained, tmp_path):
    first = {name: values[:1] for name, values in trained[1].items()}
    demo.draw_history(tmp_path / "one.png", first, "seed 0")
    assert imread(tmp_path / "one.png").std() > 0


def test_the_saved_average_is_a_plain_keras_model_that_predicts_as_the_average_does(
    trained, tmp_path
):
    model, history = trained
    written = demo.save_results(tmp_path, model, history, "seed 0")
    assert sorted(written) == sorted(tmp_path.iterdir())
    loaded = keras.models.load_model(tmp_path / "average.keras")
    assert type(loaded) is keras.Sequential
    x, _ = tiny_images()
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, using="average", verbose=0)
    )


def test_images_smaller_than_the_strides_of_the_net_are_accepted():
    assert demo.build_model((1, 1, 3), classes=4).output_shape == (None, 4)


@pytest.mark.slow
def test_on_mnist_the_average_beats_the_raw_model():
    _, history = demo.train(*load_images(), verbose=0)
    assert history["val_loss"][-1] < history["val_raw_loss"][-1]
    assert history["val_accuracy"][-1] > history["val_raw_accuracy"][-1]
