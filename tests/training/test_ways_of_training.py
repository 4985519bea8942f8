"""Wherever the bare model can be trained and asked, the wrapped one can, with the same result."""

import copy
import math
import pickle

import keras
import numpy as np
import pytest
from frameworks import BACKEND
from models import (
    CROSSENTROPY,
    EXAMPLES,
    assert_identical,
    assert_trains_as_bare,
    compile_classifier,
    create_state,
    make_classifier,
    make_compiled,
    with_momentum,
)

from polyak_model import PolyakModel, PowerAverage, UniformAverage


class Batches(keras.utils.PyDataset):
    """The batches as a `PyDataset`."""

    def __init__(self, arrays, **kwargs):
        super().__init__(**kwargs)
        self.arrays = arrays

    def __len__(self):
        return math.ceil(len(self.arrays[0]) / 16)

    def __getitem__(self, index):
        return tuple(array[16 * index : 16 * (index + 1)] for array in self.arrays)


def endless(arrays):
    """Yields batches from Python, over and over."""
    while True:
        for start in range(0, len(arrays[0]), 16):
            yield tuple(array[start : start + 16] for array in arrays)


def as_tf_data(arrays):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays).shuffle(64, seed=1).batch(16)


def as_arrays(arrays):
    return dict(zip(("x", "y", "sample_weight"), arrays, strict=False), batch_size=16)


# Each makes the keyword arguments with which `fit` sees the arrays x, y and maybe weights. Keras
# warns that it cannot shuffle a stream.
DATA = {
    "arrays": as_arrays,
    "tensors": lambda arrays: as_arrays([keras.ops.convert_to_tensor(array) for array in arrays]),
    "tf.data": lambda arrays: {"x": as_tf_data(arrays), "shuffle": False},
    "repeated-tf.data": lambda arrays: {
        "x": as_tf_data(arrays).repeat(),
        "steps_per_epoch": 3,
        "shuffle": False,
    },
    "generator": lambda arrays: {"x": endless(arrays), "steps_per_epoch": 4, "shuffle": False},
    "PyDataset": lambda arrays: {"x": Batches(arrays)},
    "PyDataset-with-workers": lambda arrays: {"x": Batches(arrays, workers=2)},
}
KINDS = pytest.mark.parametrize(
    "data",
    [
        pytest.param(make, id=name, marks=pytest.mark.tensorflow if "tf" in name else ())
        for name, make in DATA.items()
    ],
)


@pytest.fixture
def weighted(batches):
    """The batches, and a weight for each example."""
    return (*batches, np.linspace(0, 2, 64, dtype="float32"))


@KINDS
def test_every_kind_of_data_trains_as_it_does_bare(data, weighted):
    def fit(model, recorder):
        model.fit(
            **data(weighted),
            epochs=2,
            verbose=0,
            validation_data=weighted[:2],
            callbacks=[recorder],
        )

    assert_trains_as_bare(fit, lambda: make_compiled(weighted_metrics=["accuracy"]))


SETTINGS = {
    "class-weight": ({"class_weight": {0: 1.0, 1: 5.0, 2: 0.5}}, {}),
    "validation-split": ({"validation_split": 0.25}, {}),
    "validation-now-and-then": ({"validation_split": 0.25, "validation_freq": 2}, {}),
    "in-order": ({"shuffle": False}, {}),
    "steps-per-epoch": ({"steps_per_epoch": 2}, {}),
    "later-epochs": ({"initial_epoch": 1}, {}),
    "weighted-metrics": (
        {"class_weight": {0: 1.0, 1: 5.0, 2: 0.5}},
        {"weighted_metrics": ["accuracy"]},
    ),
    "loss-weights": ({}, {"loss_weights": [0.5]}),
}


@pytest.mark.parametrize(("arguments", "compilation"), SETTINGS.values(), ids=SETTINGS)
def test_every_setting_of_fit_trains_as_it_does_bare(arguments, compilation, batches):
    def fit(model, recorder):
        model.fit(*batches, batch_size=16, epochs=3, verbose=0, callbacks=[recorder], **arguments)

    assert_trains_as_bare(fit, lambda: make_compiled(**compilation))


def test_validation_data_may_be_weighted(weighted):
    def fit(model, recorder):
        model.fit(
            *weighted[:2],
            batch_size=16,
            verbose=0,
            validation_data=weighted,
            validation_steps=2,
            validation_batch_size=8,
            callbacks=[recorder],
        )

    assert_trains_as_bare(fit, lambda: make_compiled(weighted_metrics=["accuracy"]))


def make_two_headed():
    """A net of two named inputs and two named outputs, each with its loss and metric."""
    keras.utils.set_random_seed(1)
    left, right = keras.Input((6,), name="left"), keras.Input((6,), name="right")
    joined = keras.layers.Add()([keras.layers.Dense(4)(left), keras.layers.Dense(4)(right)])
    outputs = {
        "label": keras.layers.Dense(3, "softmax", name="label")(joined),
        "size": keras.layers.Dense(1, name="size")(joined),
    }
    model = keras.Model({"left": left, "right": right}, outputs)
    model.compile(
        "adam",
        loss={"label": CROSSENTROPY, "size": "mse"},
        loss_weights={"label": 1.0, "size": 0.1},
        metrics={"label": ["accuracy"], "size": ["mae"]},
    )
    return model


def test_named_inputs_and_outputs_train_as_they_do_bare(batches):
    x, y = batches
    inputs, targets = {"left": x, "right": -x}, {"label": y, "size": x[:, :1]}

    def fit(model, recorder):
        model.fit(
            inputs,
            targets,
            batch_size=16,
            validation_split=0.25,
            verbose=0,
            epochs=2,
            callbacks=[recorder],
        )

    model = assert_trains_as_bare(fit, make_two_headed, data=(inputs, targets))
    answers = model.predict(inputs, verbose=0, using="average")
    expected = model.average_model.predict(inputs, verbose=0)
    for name in ("label", "size"):
        np.testing.assert_array_equal(answers[name], expected[name])


def test_single_batches_train_as_they_do_bare(batches):
    x, y = batches

    def fit(model, recorder):
        recorder.set_model(model)
        for i in range(4):
            rows = slice(16 * i, 16 * (i + 1))
            recorder.on_train_batch_begin(i)
            logs = model.train_on_batch(
                x[rows], y[rows], class_weight={0: 1.0, 1: 2.0, 2: 3.0}, return_dict=True
            )
            recorder.on_train_batch_end(i, logs)

    assert_trains_as_bare(fit)


# Evaluating and predicting


def make_averaged():
    """Wraps a compiled classifier whose average is that of two others."""
    inner = make_compiled(weighted_metrics=["accuracy"])
    model = PolyakModel(inner, UniformAverage())
    for seed in (2, 3):
        inner.set_weights(make_classifier(seed).get_weights())
        model.update_average()
    return model


@pytest.fixture(scope="module")
def averaged():
    """Such a wrapper and a bare model to compare with.

    No test changes the wrapper, and kinds of data that look alike are traced once.
    """
    return make_averaged(), make_compiled(weighted_metrics=["accuracy"])


def for_evaluate(arguments):
    """Turns arguments of `fit` into those of `evaluate`."""
    steps = arguments.pop("steps_per_epoch", None)
    arguments.pop("shuffle", None)
    return {**arguments, "steps": steps, "verbose": 0}


def for_predict(arguments):
    """Turns arguments of `fit` into those of `predict`, which takes no targets beside arrays."""
    known = ("x", "batch_size", "steps", "verbose")
    return {name: value for name, value in for_evaluate(arguments).items() if name in known}


@KINDS
def test_every_kind_of_data_is_evaluated_and_predicted_through_every_route(
    data, averaged, weighted
):
    model, alone = averaged
    predictions = {}
    for route, member in (("raw", model.raw_model), ("average", model.average_model)):
        alone.set_weights(member.get_weights())
        expected = alone.evaluate(**for_evaluate(data(weighted)))
        received = model.evaluate(**for_evaluate(data(weighted)), using=route)
        # Two runs of one bare model may differ by a rounding on the other backends.
        exact = BACKEND == "tensorflow"
        assert received == pytest.approx(expected, rel=0 if exact else 1e-6, abs=0)
        predictions[route] = alone.predict(**for_predict(data(weighted)))
        received = model.predict(**for_predict(data(weighted)), using=route)
        np.testing.assert_array_equal(received, predictions[route])
    assert not np.array_equal(predictions["raw"], predictions["average"])
    received = model.predict(**for_predict(data(weighted)), using="ensemble")
    expected = (predictions["raw"] + predictions["average"]) / 2
    np.testing.assert_allclose(received, expected, rtol=1e-6)


def test_the_ensemble_scores_alike_on_every_kind_of_data(averaged, weighted):
    model, _ = averaged
    expected = model.evaluate(**for_evaluate(as_arrays(weighted)), using="ensemble")
    kinds = DATA.keys() - {"arrays", "repeated-tf.data"}  # The latter shows fewer batches.
    for kind in kinds if BACKEND == "tensorflow" else kinds - {"tf.data"}:
        received = model.evaluate(**for_evaluate(DATA[kind](weighted)), using="ensemble")
        assert received == pytest.approx(expected, rel=1e-5)


# Several fits


def fit_in_order(model, batches, *callbacks, **arguments):
    model.fit(
        *batches, batch_size=16, verbose=0, shuffle=False, callbacks=list(callbacks), **arguments
    )


def test_a_second_fit_goes_on_where_the_first_ended(batches):
    def fit(model, recorder):
        fit_in_order(model, batches, recorder, epochs=2)
        fit_in_order(model, batches, recorder, epochs=3, initial_epoch=2)

    assert assert_trains_as_bare(fit).average_step == 12


CHANGES = {
    "the-same-again": lambda model: compile_classifier(model, with_momentum()),
    "another-optimizer": lambda model: compile_classifier(model, "adam"),
    "another-loss": lambda model: model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(ignore_class=1)
    ),
    "the-same-optimizer": lambda model: compile_classifier(model, model.optimizer),
    "another-rate": lambda model: model.optimizer.learning_rate.assign(0.5),
    "unfrozen": lambda model: unfreeze(model),
}


def unfreeze(model):
    getattr(model, "raw_model", model).layers[0].trainable = True
    compile_classifier(model, with_momentum())


def make_frozen():
    model = make_classifier()
    model.layers[0].trainable = False
    return compile_classifier(model, with_momentum())


@pytest.mark.parametrize("change", CHANGES)
def test_the_average_goes_on_after_a_change_between_two_fits(change, batches):
    def fit(model, recorder):
        fit_in_order(model, batches, recorder)
        CHANGES[change](model)
        if not isinstance(model, PolyakModel):
            create_state(model, EXAMPLES)
        fit_in_order(model, batches, recorder, epochs=2)

    make = make_frozen if change == "unfrozen" else make_compiled
    assert assert_trains_as_bare(fit, make, PowerAverage(2.0)).average_step == 12


def test_fitting_no_epoch_changes_nothing(batches):
    def fit(model, recorder):
        fit_in_order(model, batches, recorder)
        before = model.get_weights()
        fit_in_order(model, batches, recorder, epochs=0)
        fit_in_order(model, batches, recorder, epochs=2, initial_epoch=2)
        assert_identical(before, model.get_weights())

    assert assert_trains_as_bare(fit).average_step == 4


# Copies


COPIES = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


def make_without_dropout():
    """Keras copies no state of dropout, so that a copy with it would train on otherwise."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, "softmax")])
    return compile_classifier(model)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_goes_on_as_the_original_does_and_shares_nothing_with_it(make_copy, batches):
    def fit(model, recorder):
        fit_in_order(model, batches, recorder)

    model = assert_trains_as_bare(fit, make_without_dropout)
    duplicate = make_copy(model)
    assert duplicate.inference == "raw"
    assert duplicate.shadow.first.rule == UniformAverage()
    before = model.get_weights()
    fit_in_order(duplicate, batches)
    assert_identical(before, model.get_weights())
    fit_in_order(model, batches)
    assert duplicate.average_step == model.average_step == 8
    assert_identical(model.raw_model.get_weights(), duplicate.raw_model.get_weights())
    assert_identical(model.average_model.get_weights(), duplicate.average_model.get_weights())
