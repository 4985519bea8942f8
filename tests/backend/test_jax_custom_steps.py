"""The laws for training steps of one's own, which on JAX take and return the state."""

import closed_forms
import jax
import keras
import numpy as np
import pytest
from keras import layers, ops
from models import LazyClassifier, Recorder, assert_close, assert_trains_as_bare

from polyak_model import ExponentialAverage, PolyakModel


class Autoencoder(keras.Sequential):
    """A net with a training and a test step, as in the guides of Keras."""

    def train_step(self, state, data):
        trainable, non_trainable, optimizer, metrics = state
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        differentiate = jax.value_and_grad(self.loss_of, has_aux=True)
        (loss, (outputs, non_trainable)), gradients = differentiate(
            trainable, non_trainable, x, y, True
        )
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        logs, metrics = self.track(metrics, loss, y, outputs)
        return logs, (trainable, non_trainable, optimizer, metrics)

    def test_step(self, state, data):
        trainable, non_trainable, metrics = state
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        loss, (outputs, non_trainable) = self.loss_of(trainable, non_trainable, x, y, False)
        logs, metrics = self.track(metrics, loss, y, outputs)
        return logs, (trainable, non_trainable, metrics)

    def loss_of(self, trainable, non_trainable, x, y, training):
        outputs, non_trainable = self.stateless_call(trainable, non_trainable, x, training=training)
        return ops.mean((outputs - y) ** 2), (outputs, non_trainable)

    def track(self, values, loss, y, outputs):
        logs, changed = {}, []
        for metric in self.metrics:
            given = (loss,) if metric.name == "loss" else (y, outputs)
            count = len(metric.variables)
            own = metric.stateless_update_state(values[:count], *given)
            logs[metric.name] = metric.stateless_result(own)
            values, changed = values[count:], [*changed, *own]
        return logs, changed

    @property
    def metrics(self):
        return [self.loss_tracker, self.error]


def make_autoencoder(**mode):
    model = Autoencoder(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Dropout(0.3, seed=1),
            layers.Dense(6),
        ]
    )
    model.loss_tracker = keras.metrics.Mean(name="loss")
    model.error = keras.metrics.MeanAbsoluteError(name="error")
    model.compile(keras.optimizers.Adam(0.01), **mode)
    return model


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_step_of_the_users_trains_as_it_does_bare_and_the_average_follows(run_eagerly, batches):
    x = batches[0]

    def fit(model, recorder):
        model.fit(
            x, x, batch_size=16, epochs=2, verbose=0, validation_data=(x, x), callbacks=[recorder]
        )

    model = assert_trains_as_bare(fit, lambda: make_autoencoder(run_eagerly=run_eagerly))
    scores = model.evaluate(x, x, verbose=0, return_dict=True, using="average")
    alone = model.average_model.evaluate(x, x, verbose=0, return_dict=True)
    assert scores == pytest.approx(alone)
    assert scores["error"] != model.raw_model.evaluate(x, x, verbose=0, return_dict=True)["error"]


class MeanTeacher(keras.Model):
    """Trains a part to agree with its own average at that moment (Tarvainen & Valpola 2017)."""

    def __init__(self, student, rule):
        super().__init__()
        self.part = PolyakModel(student, rule)
        self.averages = []
        self.built = True

    def train_step(self, state, data):
        trainable, non_trainable, optimizer, metrics = state
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)

        def loss_of(trainable):
            variables = [*self.trainable_variables, *self.non_trainable_variables]
            pairs = [*zip(variables, [*trainable, *non_trainable], strict=True)]
            with keras.StatelessScope(pairs) as scope:
                target = self.part(x, training=False)
                predicted = self.part(x + 0.1, training=True)
                loss = ops.mean(keras.losses.sparse_categorical_crossentropy(y, predicted))
                loss += ops.mean((predicted - target) ** 2)
                average = [weight.value for weight in self.part.shadow.first.model.weights]
            changed = [scope.get_current_value(v) for v in self.non_trainable_variables]
            return loss, (changed, average)

        (loss, (non_trainable, average)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            trainable
        )
        self.averages.append([np.asarray(weight) for weight in average])
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"loss": loss}, (trainable, non_trainable, optimizer, metrics)


class PartRecorder(Recorder):
    def step(self):
        return int(self.model.optimizer.iterations)


def test_the_mean_teacher_is_exact_at_the_moment_it_teaches(batches):
    x, y = batches
    rule = ExponentialAverage(0.8, debias=False)
    student = LazyClassifier()
    student(x)
    start = student.get_weights()
    model = MeanTeacher(student, rule)
    model.compile("adam", run_eagerly=True)
    recorder = PartRecorder(student)
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[recorder])
    iterates = recorder.iterates()
    assert len(iterates) == len(model.averages) == 8
    for step, received in enumerate(model.averages):
        expected = closed_forms.average(rule, start, iterates[:step])
        assert_close(expected, received, ulps=4)
    expected = closed_forms.average(rule, start, iterates)
    assert_close(expected, model.part.average_model.get_weights(), ulps=4)
