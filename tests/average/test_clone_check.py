import keras
import numpy as np
import pytest
from keras import layers

from polyak_model import PolyakModel, UniformAverage


def test_a_model_that_draws_at_inference_is_compared_with_equal_seeds():
    class Noisy(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.generator = keras.random.SeedGenerator()

        def call(self, inputs):
            return inputs + keras.random.normal(keras.ops.shape(inputs), seed=self.generator)

    inner = keras.Sequential([keras.Input((3,)), Noisy(), layers.Dense(1)])
    seed = inner.layers[0].generator.state.numpy()
    PolyakModel(inner)
    np.testing.assert_array_equal(inner.layers[0].generator.state.numpy(), seed)


class HiddenState(layers.Layer):
    """Holds state that neither its weights nor its config show."""

    offset = 0.0

    def call(self, inputs):
        return inputs + self.offset


def make_hidden(offset=2.0):
    model = keras.Sequential([keras.Input((3,)), HiddenState(), layers.Dense(2)])
    model.layers[0].offset = offset
    return model


def make_without_offset():
    return make_hidden(0.0)


def test_a_clone_function_whose_model_has_other_outputs_is_refused():
    with pytest.raises(ValueError, match="same weights but other outputs.*Pass `clone_function`"):
        PolyakModel(make_hidden(), clone_function=make_without_offset)


def test_a_copy_has_the_state_that_keras_cannot_see():
    model = PolyakModel(make_hidden())
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), model.raw_model.predict(x, verbose=0)
    )


@pytest.mark.parametrize("size", [None, 20])
def test_a_probe_is_large_enough_for_convolutions(size):
    def make(offset=0.0):
        hidden = HiddenState()
        hidden.offset = offset
        convolutions = [layers.Conv2D(2, 5), layers.Conv2D(2, 5)]
        return keras.Sequential(
            [keras.Input((size, size, 1)), *convolutions, hidden, layers.GlobalMaxPooling2D()]
        )

    with pytest.raises(ValueError, match="same weights but other outputs"):
        PolyakModel(make(1.0), clone_function=make)


class Picky(layers.Layer):
    """Takes no inputs but its own."""

    picky = False

    def call(self, inputs):
        if self.picky:
            raise ValueError("The inputs must be sorted.")
        return inputs


def test_a_model_that_fails_on_random_inputs_is_wrapped():
    inner = keras.Sequential([keras.Input((3,)), Picky(), layers.Dense(2)])
    inner.layers[0].picky = True
    assert PolyakModel(inner).built


class OnlyEager(keras.Model):
    """Decides by a value, which a symbolic tensor does not have."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        outputs = self.dense(inputs)
        return outputs if float(keras.ops.mean(inputs)) > 0 else -outputs

    def get_config(self):
        return {}


def test_a_model_that_only_runs_eagerly_is_built_by_its_first_batch():
    x, y = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")
    losses = []
    for wrap in (False, True):
        keras.utils.set_random_seed(1)
        model = PolyakModel(OnlyEager(), UniformAverage()) if wrap else OnlyEager()
        model.compile("sgd", "mse", run_eagerly=True)
        losses.append(model.fit(x, y, epochs=2, batch_size=4, verbose=0).history)
    assert losses[0] == losses[1]
    assert model.average_step == 4
    raw, average = (model.predict(x, verbose=0, using=route) for route in ("raw", "average"))
    assert not np.array_equal(raw, average)


class Joined(layers.Layer):
    """Takes a dict or a list of inputs."""

    def call(self, inputs):
        return sum(inputs.values()) if isinstance(inputs, dict) else sum(inputs)


class OnTensors(layers.Layer):
    """Takes tensors of TensorFlow, no symbolic ones of Keras."""

    def call(self, inputs):
        import tensorflow as tf

        if isinstance(inputs, keras.KerasTensor):
            raise TypeError("no symbolic tensors")
        return tf.sin(inputs)


X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize(
    ("first", "x"), [(Joined, {"a": X, "b": -2 * X}), (Joined, [X, 2 * X]), (OnTensors, X)]
)
def test_a_sequential_without_an_input_trains_as_bare(first, x, run_eagerly):
    weights = []
    for wrap in (False, True):
        keras.utils.set_random_seed(1)
        inner = keras.Sequential([first(), layers.Dense(2)])
        model = PolyakModel(inner, UniformAverage()) if wrap else inner
        model.compile("sgd", "mse", run_eagerly=run_eagerly)
        model.fit(x, X[:, :2], batch_size=4, shuffle=False, verbose=0)
        weights.append(inner.get_weights())
    assert model.average_step == 4
    assert len(weights[0]) == len(model.average_model.weights) == 2
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.predict(x, verbose=0).shape == (16, 2)
