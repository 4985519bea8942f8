import argparse

import batch_normalization
import numpy as np
import pytest
from models import assert_identical

from polyak_model import PolyakModel, UniformAverage

pytestmark = pytest.mark.benchmarks


def test_copying_statistics_at_the_end_is_what_copying_them_all_along_comes_to(batches):
    def train(non_trainable):
        model = batch_normalization.build_model(rate=0.1, seed=0)
        model = PolyakModel(model, UniformAverage(), non_trainable=non_trainable)
        x, y = batches[0][:, :4, None, None], batches[1]
        model.fit(np.tile(x, (1, 7, 28, 1)), y, batch_size=16, verbose=0)
        return model

    copied, averaged = train("copy"), train("average")
    batch_normalization.copy_statistics(averaged.raw_model, averaged.average_model)
    assert_identical(copied.average_model.get_weights(), averaged.average_model.get_weights())


@pytest.mark.filterwarnings("ignore:The average 'average' remembers")  # Which is the point.
@pytest.mark.parametrize(("batch_size", "epochs"), [(4, 3), (128, 1)])
def test_a_uniform_average_at_a_large_rate_needs_statistics_of_its_own(batch_size, epochs):
    options = argparse.Namespace(images=None, epochs=epochs, learning_rate=0.5)
    scores = batch_normalization.score(0, batch_size, options)
    names = batch_normalization.STATISTICS
    accuracy = {name: own[0] for name, own in zip(names, scores, strict=True)}
    if batch_size == 4:  # The iterates are noisy, so the last one says little of their average.
        assert accuracy["copied"] + 5 < min(accuracy["averaged"], accuracy["refreshed"])
    else:  # The training is short, so averaged statistics remember the initial ones.
        assert accuracy["averaged"] + 5 < accuracy["refreshed"]
