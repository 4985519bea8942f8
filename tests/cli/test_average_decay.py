import numpy as np
import pytest
from weight_samples import write_hdf5

from polyak_model.rules import decay_shares
from polyak_model.weight_files.reader import open_weights

SHARES = {
    "cosine": [0.0954915028, 0.25, 0.3090169944, 0.25, 0.0954915028],
    "linear": [0.2] * 5,
    "1-sqrt": -np.diff(1 - np.sqrt(np.arange(6) / 5)),
}


@pytest.mark.parametrize("shape", SHARES)
def test_shares_are_the_falls_of_the_learning_rate(shape):
    np.testing.assert_allclose(decay_shares(shape, 5), SHARES[shape], atol=5e-11)
    assert decay_shares(shape, 1000).sum() == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("shape", SHARES)
def test_averaging_checkpoints_is_training_on_with_a_decayed_rate(shape):
    # With the same updates, to first order: one per checkpoint.
    updates = np.random.default_rng(0).normal(size=(5, 3))
    checkpoints = np.concatenate([np.zeros((1, 3)), updates.cumsum(0)])
    factors = 1 - np.cumsum(decay_shares(shape, 6))[:-1]
    np.testing.assert_allclose(decay_shares(shape, 6) @ checkpoints, factors @ updates, atol=1e-14)


@pytest.fixture
def files(tmp_path):
    for n in range(1, 6):
        write_hdf5(tmp_path / f"{n}.weights.h5", {"vars/0": np.array([float(n == 3), n])})
    return [f"{n}.weights.h5" for n in range(1, 6)]


@pytest.mark.parametrize("shape", SHARES)
def test_the_command_averages_with_these_shares(run, files, shape):
    text = run("average", *files, "--rule", "decay", "--shape", shape, "-o", "out.weights.h5")
    assert f"{100 * SHARES[shape][0]:6.2f} %  1.weights.h5" in text
    with open_weights("out.weights.h5") as weights:
        third, _ = weights.variables["vars/0"].read()
    assert third == pytest.approx(SHARES[shape][2], abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shape", "cosine"], "`--shape` does not apply to --rule uniform."),
        (["--rule", "decay", "--decay", 0.9], "`--decay` does not apply to --rule decay."),
        (["--refresh", "1.weights.h5"], "`--refresh` needs .keras files, which contain the model"),
    ],
)
def test_options_that_contradict_each_other_are_refused(refused, files, arguments, expected):
    assert expected in refused("average", *files, *arguments, "-o", "out.weights.h5")


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="`shape` must be one of 'cosine', 'linear', '1-sqrt'"):
        decay_shares("step", 5)
