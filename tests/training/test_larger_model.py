"""The laws for a PolyakModel that is a part of a larger model, which knows nothing of it."""

import closed_forms
import keras
import numpy as np
import pytest
from frameworks import BACKEND, gradients_of
from keras import layers
from models import CROSSENTROPY, LazyClassifier, Recorder, assert_close

from polyak_model import ExponentialAverage, PolyakModel, PowerAverage, UniformAverage


def make_part():
    """Makes a net with statistics, dropout, a penalty on weights and one on outputs."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(momentum=0.9),
            layers.Dropout(0.3, seed=1),  # PyTorch draws the others from a global generator.
            layers.Dense(4, activity_regularizer="l2"),
        ]
    )


def once(part):
    x = keras.Input((6,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(part(x)))


def twice(part):
    x = keras.Input((6,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(part(x) * part(-x)))


def in_two_branches(part):
    x = keras.Input((6,))
    joined = layers.Concatenate()([part(layers.Dense(6)(x)), layers.Dense(2)(part(x))])
    return keras.Model(x, layers.Dense(3, activation="softmax")(joined))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """A larger model that leaves it to Keras to hand the training flag down."""

    def __init__(self, part, **kwargs):
        super().__init__(**kwargs)
        self.part = part
        self.head = layers.Dense(3, activation="softmax")

    def call(self, inputs, training=None):
        return self.head(self.part(inputs))

    def get_config(self):
        return {"part": keras.saving.serialize_keras_object(self.part)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["part"]))


OTHER_MODES = ({"run_eagerly": True}, *([{"jit_compile": True}] if BACKEND != "torch" else []))


class PartRecorder(Recorder):
    """Records the raw weights of a part after each batch, and the step of the whole."""

    def __init__(self, raw, whole):
        self.whole = whole
        super().__init__(raw)

    def step(self):
        optimizer = self.whole.optimizer
        return int(getattr(optimizer, "inner_optimizer", optimizer).iterations)


def is_bit_for_bit(mode):
    """Returns whether XLA compiles neither model."""
    return mode.get("run_eagerly") or not (BACKEND == "jax" or mode.get("jit_compile"))


def train(place, batches, wrap=True, rule=None, optimizer=None, **mode):
    keras.utils.set_random_seed(3)
    raw = make_part()
    part = PolyakModel(raw, rule or UniformAverage()) if wrap else raw
    whole = place(part)
    # It is traced once: to make the variables of another optimizer, TensorFlow traces twice.
    whole.compile(optimizer or keras.optimizers.SGD(0.1), CROSSENTROPY, **mode)
    recorder = PartRecorder(raw, whole)
    history = whole.fit(*batches, batch_size=8, epochs=2, verbose=0, callbacks=[recorder]).history
    return whole, part, recorder.iterates(), history


def assert_average(rule, iterates, part, start=None):
    """Compares an average with the oracle, to four float32 roundings of the largest weight."""
    expected = closed_forms.average(rule, start or iterates[0], iterates)
    assert_close(expected, part.average_model.get_weights(), ulps=4)


@pytest.mark.parametrize(
    ("place", "mode"),
    [
        *((place, {}) for place in (once, twice, in_two_branches, Subclassed)),
        *((in_two_branches, mode) for mode in OTHER_MODES),
    ],
)
def test_the_larger_model_trains_as_with_the_bare_part_and_the_average_follows(
    place, mode, batches
):
    whole, part, iterates, history = train(place, batches, optimizer="adam", **mode)
    assert part.average_step == len(iterates) == 16
    bare = place(make_part())
    bare(batches[0])
    assert len(whole.trainable_weights) == len(bare.trainable_weights)
    assert_average(UniformAverage(), iterates, part)
    if is_bit_for_bit(mode):
        _, _, bare_iterates, bare_history = train(
            place, batches, wrap=False, optimizer="adam", **mode
        )
        assert history == bare_history
        for one, other in zip(bare_iterates[-1], iterates[-1], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "rule",
    [
        ExponentialAverage(0.9, debias=False),
        PowerAverage(gamma=2, start_step=4, update_every=4),
        UniformAverage(start_step=20),
    ],
    ids=["biased", "late-and-rare", "unbegun"],
)
def test_the_average_follows_by_every_rule_also_from_weights_set_after_wrapping(rule, batches):
    part = PolyakModel(make_part(), rule)
    whole = once(part)
    whole.compile(keras.optimizers.SGD(0.1), CROSSENTROPY)
    whole.evaluate(*batches, verbose=0)
    start = [0.5 * w for w in part.raw_model.get_weights()]
    part.raw_model.set_weights(start)
    recorder = PartRecorder(part.raw_model, whole)
    whole.fit(*batches, batch_size=4, verbose=0, callbacks=[recorder])
    assert part.average_step == 16
    assert_average(rule, recorder.iterates(), part, start)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2e38),
    ],
    ids=["accumulated", "scaled"],
)
def test_a_batch_without_an_optimizer_step_moves_nothing(optimizer, batches):
    _, part, iterates, _ = train(once, batches, optimizer=optimizer())
    assert 0 < part.average_step == len(iterates) < 16
    assert_average(UniformAverage(), iterates, part)


def test_outside_training_the_route_answers_and_no_step_is_taken(batches):
    x, y = batches
    whole, part, iterates, _ = train(once, batches)
    head = whole.layers[-1]
    for _ in range(2):
        for route, answer in (("average", part.average_model), ("raw", part.raw_model)):
            part.inference = route
            whole.make_predict_function(force=True)
            np.testing.assert_allclose(
                whole.predict(x, verbose=0),
                keras.ops.convert_to_numpy(head(answer(x, training=False))),
                rtol=1e-5,
                atol=1e-6,
            )
            whole.evaluate(x, y, verbose=0)
    assert part.average_step == 16
    assert_average(UniformAverage(), iterates, part)


def test_evaluation_right_after_training_uses_the_newest_iterate(batches):
    x, _ = batches
    whole, part, iterates, _ = train(once, batches, rule=ExponentialAverage(0.0))
    newest = whole.predict(x, verbose=0)
    np.testing.assert_array_equal(part.shadow.first.model.get_weights()[0], iterates[-1][0])
    part.inference = "raw"
    whole.make_predict_function(force=True)
    np.testing.assert_array_equal(newest, whole.predict(x, verbose=0))


def test_a_second_fit_and_a_saved_larger_model_go_on(batches, tmp_path):
    whole, _, iterates, _ = train(once, batches)
    whole.save(tmp_path / "whole.keras")
    loaded = keras.models.load_model(tmp_path / "whole.keras")
    for each in (whole, loaded):
        same = next(layer for layer in each.layers if isinstance(layer, PolyakModel))
        recorder = PartRecorder(same.raw_model, each)
        each.fit(*batches, batch_size=32, verbose=0, callbacks=[recorder])
        assert same.average_step == 18
        assert_average(UniformAverage(), iterates + recorder.iterates(), same)


def test_the_average_adds_no_losses_to_the_larger_model(batches):
    x, _ = batches
    part = PolyakModel(make_part())
    whole = twice(part)
    whole(x, training=False)
    penalty = keras.regularizers.L2()(part.raw_model.layers[0].kernel)
    assert list(map(keras.ops.convert_to_numpy, whole.losses)) == [
        keras.ops.convert_to_numpy(penalty)
    ]
    whole(x, training=True)
    assert len(whole.losses) == 3


def test_a_part_that_is_frozen_takes_no_steps(batches):
    whole, part, iterates, _ = train(once, batches)
    part.trainable = False
    whole.compile("sgd", CROSSENTROPY)
    whole.fit(*batches, batch_size=8, verbose=0)
    assert part.average_step == 16
    assert_average(UniformAverage(), iterates, part)


def test_steps_reported_by_hand_are_not_counted_twice(batches):
    x, y = batches[0], keras.ops.cast(batches[1], "float32")
    model = PolyakModel(make_part(), UniformAverage())
    optimizer = keras.optimizers.SGD(0.1)
    iterates = []
    for report in (True, False, False, True, True):
        weights = model.trainable_weights
        gradients = gradients_of(lambda: keras.ops.mean(model(x, training=True)[:, 0] - y), model)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        iterates.append(model.raw_model.get_weights())
        if report:
            model.update_average()
    assert model.average_step == 5
    assert_average(UniformAverage(), iterates, model)


def test_applying_the_average_is_no_step(batches):
    whole, part, _, _ = train(once, batches)
    part.apply_average()
    whole.evaluate(*batches, verbose=0)
    assert part.average_step == 16
    part.reset_average()
    whole.evaluate(*batches, verbose=0)
    assert part.average_step == 0


# Mean teacher


class MeanTeacher(keras.Model):
    """A student that agrees with its own average where there are no labels."""

    def __init__(self, student, rule):
        super().__init__()
        self.part = PolyakModel(student, rule)
        self.averages = []

    def call(self, inputs, training=None):
        return self.part(inputs, training=training)

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            target = self.part(x, training=False)
            predicted = self.part(x + 0.1, training=True)
            loss = self.compute_loss(x, y, predicted) + keras.ops.mean((predicted - target) ** 2)
        self.averages.append(self.part.shadow.first.model.get_weights())
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


@pytest.mark.tensorflow
def test_the_mean_teacher_is_exact_at_the_moment_it_teaches(batches):
    x, y = batches
    rule = ExponentialAverage(0.8, debias=False)
    student = LazyClassifier()
    student(x)
    start = student.get_weights()
    model = MeanTeacher(student, rule)
    model.compile("adam", CROSSENTROPY, run_eagerly=True)
    recorder = PartRecorder(student, model)
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[recorder])
    iterates = recorder.iterates()
    assert len(iterates) == len(model.averages) == 8
    for step, received in enumerate(model.averages):
        for one, other in zip(
            closed_forms.average(rule, start, iterates[:step]), received, strict=True
        ):
            np.testing.assert_allclose(other, one, rtol=0, atol=5e-7)
    assert_average(rule, iterates, model.part, start)


def test_the_average_follows_on_every_replica(strategy, batches):
    with strategy.scope():
        part = PolyakModel(make_part(), UniformAverage())
        whole = once(part)
        whole.compile("adam", CROSSENTROPY)
    iterates = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: iterates.append(part.raw_model.get_weights())
    )
    whole.fit(*batches, batch_size=8, verbose=0, validation_data=batches, callbacks=[record])
    assert part.average_step == 8
    for i, average in enumerate(part.average_model.weights):
        first, second = (component.numpy() for component in average.value.values)
        np.testing.assert_array_equal(first, second)
        if part.raw_model.weights[i].trainable:
            expected = np.mean([iterate[i].astype("float64") for iterate in iterates], axis=0)
            np.testing.assert_allclose(first, expected, rtol=0, atol=5e-7)
