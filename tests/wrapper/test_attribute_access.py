import keras
import numpy as np
import pytest
from models import compile_classifier, make_classifier

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage


class Scaled(keras.Model):
    """A model with an attribute, a variable, a method and further arguments of `call`."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)
        self.beta = 3.0
        self.gamma = keras.Variable(2.0, trainable=False)
        self.supports_masking = True

    def call(self, inputs, scale=None, mask=None):
        outputs = self.gamma * self.dense(inputs)
        if scale is not None:
            outputs = outputs * scale
        return outputs if mask is None else outputs * keras.ops.cast(mask, "float32")[:, None]

    def sample(self):
        return self.beta


@pytest.fixture
def model():
    model = PolyakModel(Scaled())
    model.build((None, 3))
    return model


def test_attributes_of_the_raw_model_are_read_and_set_through_the_wrapper(model):
    assert model.beta == 3.0
    model.beta = 5.0
    assert model.raw_model.beta == 5.0
    model.gamma.assign(7.0)
    assert float(model.raw_model.gamma.numpy()) == 7.0
    model.gamma = 8.0
    assert model.raw_model.gamma == 8.0


def test_a_new_attribute_stays_on_the_wrapper(model):
    model.note = "mine"
    assert model.note == "mine"
    assert not hasattr(model.raw_model, "note")


def test_a_method_of_the_raw_model_is_called_on_one_of_the_models(model):
    assert not hasattr(model, "sample")
    with pytest.raises(AttributeError, match="model.raw_model.sample or model.average_model.sam"):
        model.sample()
    assert model.average_model.sample() == 3.0


def test_a_missing_attribute_is_named(model):
    with pytest.raises(AttributeError, match="'PolyakModel' object has no attribute 'nothing'"):
        _ = model.nothing


@pytest.mark.parametrize(
    "name", ["average", "clone_function", "combine", "compensated", "device", "non_trainable"]
)
def test_an_argument_that_would_do_nothing_later_is_refused(model, name):
    with pytest.raises(AttributeError, match=f"`{name}` cannot be changed after a model was wra"):
        setattr(model, name, 0.5)


def test_a_callback_acts_on_the_raw_model_as_on_the_bare_one(batches):
    class Anneal(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.beta = float(epoch)
            self.model.gamma.assign(1.0 + epoch)

    def train(wrap):
        keras.utils.set_random_seed(0)
        inner = Scaled()
        model = PolyakModel(inner) if wrap else inner
        model.compile("sgd", "mse")
        y = np.eye(2, dtype="float32")[batches[1] % 2]
        model.fit(batches[0], y, epochs=3, callbacks=[Anneal()], verbose=0)
        return inner

    bare, raw = train(wrap=False), train(wrap=True)
    assert raw.beta == bare.beta == 2.0
    for one, other in zip(bare.get_weights(), raw.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("route", ["average", "raw", "ensemble"])
def test_arguments_of_call_reach_every_route(model, route, training):
    model.inference = route
    x, mask = np.ones((4, 3), "float32"), np.array([True, False, True, False])
    scale = keras.ops.convert_to_tensor(3.0)
    for arguments in ({"scale": scale}, {"mask": mask}, {"scale": scale, "mask": mask}):
        expected = model.raw_model(x, **arguments)
        np.testing.assert_array_equal(model(x, training=training, **arguments), expected)
    np.testing.assert_array_equal(
        model(x, scale, training=training), model.raw_model(x, scale=scale)
    )


def test_a_rule_set_while_training_acts_from_the_next_step_on(batches):
    class Switch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.rule = ExponentialAverage(0.0)

    model = PolyakModel(compile_classifier(make_classifier()), UniformAverage())
    model.fit(*batches, epochs=1, batch_size=4, verbose=0)
    raw, average = model.raw_model.get_weights(), model.average_model.get_weights()
    assert not np.array_equal(raw[0], average[0])
    model.fit(*batches, epochs=2, batch_size=4, callbacks=[Switch()], verbose=0)
    assert model.average_step == 48
    assert model.rule == ExponentialAverage(0.0)
    for one, other in zip(
        model.raw_model.get_weights(), model.average_model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_rule_is_refused_and_the_old_one_stays(model):
    rule = model.rule
    with pytest.raises(ValueError, match="must be a decay in"):
        model.rule = "uniform"
    assert model.rule == rule


@pytest.mark.parametrize("changed", ["raw_model", "average_model"])
def test_a_model_that_was_changed_after_wrapping_is_refused_by_name_wherever_it_is_used(
    batches, tmp_path, changed
):
    model = PolyakModel(compile_classifier(make_classifier()))
    model.predict(batches[0], verbose=0)
    getattr(model, changed).layers[0].enable_lora(2)
    for call in (
        lambda: model.predict(batches[0], verbose=0),
        lambda: model.evaluate(*batches, verbose=0),
        lambda: model.fit(*batches, verbose=0),
        lambda: model.save(tmp_path / "model.keras"),
        lambda: model.average_model,
    ):
        with pytest.raises(ValueError, match=r"must keep the weights.*lora_kernel_a.*then wrap"):
            call()
    assert not (tmp_path / "model.keras").exists()


def test_steps_that_no_optimizer_counts_are_refused(batches):
    class Descends(keras.Sequential):
        def train_step(self, data):
            for weight in self.trainable_weights:
                weight.assign(0.9 * weight)
            return {"loss": keras.ops.zeros(())}

    model = PolyakModel(Descends([keras.Input((6,)), keras.layers.Dense(3)]))
    model.compile(optimizer=None, loss="mse")
    before = model.raw_model.get_weights()
    with pytest.raises(ValueError, match="no optimizer that counts its steps.*update_average"):
        model.fit(batches[0], batches[0][:, :3], verbose=0)
    np.testing.assert_array_equal(before[0], model.raw_model.get_weights()[0])


def test_the_legacy_format_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(ValueError, match=r"saved as a '.keras' file.*weights.h5"):
        model.save(tmp_path / "model.h5")
    assert not any(tmp_path.iterdir())
