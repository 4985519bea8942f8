import keras
import numpy as np
import pytest

X = np.random.default_rng(0).normal(2, 3, size=(40, 3)).astype("float32")


@pytest.fixture(autouse=True)
def files(working_folder):
    """Two models whose statistics fit no data."""
    for name in ("one", "two"):
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
        )
        model.compile("sgd", loss="mse")
        model.save(f"{name}.keras")
        model.save_weights(f"{name}.weights.h5")
    np.savez("data.npz", x=X, y=X[:, :1])
    np.savez("wrong.npz", x=X[:, :2])


COMMANDS = {
    "average": ["average", "one.keras", "two.keras"],
    "soup": ["soup", "one.keras", "one.weights.h5", "two.keras", "--data", "data.npz"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_statistics_are_refreshed(run, command):
    text = run(*command, "--refresh", "data.npz", "-o", "out.keras")
    assert "BatchNormalization" not in text
    norm = keras.models.load_model("out.keras").layers[0]
    np.testing.assert_allclose(norm.moving_mean, X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, X.var(0), rtol=1e-5)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_data_that_does_not_fit_is_refused(refused, command):
    expected = "Cannot refresh the statistics with these inputs"
    assert expected in refused(*command, "--refresh", "wrong.npz", "-o", "out.keras")
    expected = "`--refresh` must be an .npz file of training data"
    assert expected in refused(*command, "--refresh", "one.keras", "-o", "out.keras")
