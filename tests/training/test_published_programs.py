"""Programs as people publish them, with one line changed."""

import closed_forms
import keras
import pytest
from models import assert_close, assert_identical
from object_graphs import assert_shares_nothing
from published_programs import PROGRAMS

from polyak_model import PolyakModel, UniformAverage, clone_model


class Iterates(keras.callbacks.Callback):
    """Records the weights of a model after each batch."""

    def __init__(self, raw):
        super().__init__()
        self.raw = raw
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.raw.get_weights())


def run(program, wrap):
    keras.utils.set_random_seed(1)
    raw = []

    def prepare(model):
        raw.append(model)
        return PolyakModel(model, UniformAverage()) if wrap else model

    model, arguments = program(prepare)
    iterates = Iterates(raw[0])
    arguments = {"batch_size": 8, **arguments}
    history = model.fit(**arguments, epochs=2, shuffle=False, verbose=0, callbacks=[iterates])
    return model, iterates.weights, history.history


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_published_program_trains_as_bare_and_its_average_is_the_closed_form(program):
    _, expected, bare = run(program, wrap=False)
    model, iterates, history = run(program, wrap=True)
    assert history == bare
    assert len(expected) == len(iterates) == model.average_step == 6
    for one, other in zip(expected, iterates, strict=True):
        assert_identical(one, other)
    averages = closed_forms.average(UniformAverage(), iterates[0], iterates)
    assert_close(averages, model.average_model.get_weights(), ulps=4)
    assert_shares_nothing(model.raw_model, clone_model(model.raw_model))
