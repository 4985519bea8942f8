"""Models of every kind, wrapped, fitted, evaluated, asked, saved and loaded."""

import numpy as np
import pytest
from frameworks import BACKEND
from kinds import Trained, check_kind, check_large_kind
from model_zoo import APPLICATIONS, KINDS


def marks(name):
    # Without TensorFlow, Keras has no layers that look up words or numbers.
    return pytest.mark.tensorflow if {"words", "numbers", "text"} & {*name.split("-")} else ()


# Keras trains no stateful layer on PyTorch, see tests/backend/test_torch.py.
NAMES = [name for name in KINDS if (name, BACKEND) != ("stateful", "torch")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMES])
def test_a_model_of_every_kind_trains_averages_answers_and_is_saved(name, tmp_path):
    check_kind(KINDS[name], tmp_path)


# XLA compiles such a model for minutes, and the kinds above are its parts.
@pytest.mark.tensorflow
@pytest.mark.zoo
@pytest.mark.parametrize("kind", APPLICATIONS.values(), ids=APPLICATIONS)
def test_an_application_trains_averages_answers_and_is_saved(kind, tmp_path):
    check_large_kind(kind, tmp_path)


def test_the_average_of_constrained_weights_keeps_constraints_that_are_convex():
    model = Trained(KINDS["constraints"], wrap=True).model
    bounded, positive, _ = model.average_model.layers
    assert np.linalg.norm(bounded.get_weights()[0], axis=0).max() <= 0.5 * (1 + 1e-6)
    assert positive.get_weights()[0].min() >= 0
    # Both constraints are at work.
    assert np.linalg.norm(bounded.get_weights()[0], axis=0).max() > 0.49
    assert (positive.get_weights()[0] == 0).any()
