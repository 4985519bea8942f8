"""The laws for models with training steps of their own."""

import concurrent.futures
import functools

import closed_forms
import keras
import numpy as np
import pytest
from custom_steps import Adversaries, Autoencoder, Denoiser

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage


def compile_adversaries(model):
    model.compile(
        keras.optimizers.Adam(0.01),
        critic_optimizer=keras.optimizers.Adam(0.01),
        loss_function=keras.losses.BinaryCrossentropy(from_logits=True),
    )


MODELS = {
    "autoencoder": (Autoencoder, lambda model: model.compile("adam")),
    "adversaries": (Adversaries, compile_adversaries),
    "denoiser": (Denoiser, lambda model: model.compile("adam")),
}


class Recorder(keras.callbacks.Callback):
    def __init__(self, raw):
        super().__init__()
        self.raw = raw
        self.iterates = []

    def on_train_batch_end(self, batch, logs=None):
        self.iterates.append(self.raw.get_weights())


def train(make, compile_model, x, wrap):
    keras.utils.set_random_seed(2)
    inner = make()
    if make is Denoiser:
        inner.net.build((None, 7))
    model = PolyakModel(inner, UniformAverage(), report=("raw",)) if wrap else inner
    compile_model(model)
    recorder = Recorder(inner)
    history = model.fit(
        x, batch_size=16, epochs=2, verbose=0, shuffle=False, callbacks=[recorder]
    ).history
    return model, recorder.iterates, history


@pytest.mark.parametrize(("make", "compile_model"), MODELS.values(), ids=MODELS)
def test_the_users_step_trains_as_it_does_bare_and_the_average_follows(
    make, compile_model, batches
):
    x = batches[0]
    _, expected, bare_history = train(make, compile_model, x, wrap=False)
    model, iterates, history = train(make, compile_model, x, wrap=True)
    assert history == bare_history
    assert len(iterates) == model.average_step == 8
    for one, other in zip(expected[-1], iterates[-1], strict=True):
        np.testing.assert_array_equal(one, other)
    averages = closed_forms.average(UniformAverage(), iterates[0], iterates)
    assert len(averages) == len(model.average_model.weights) > 0
    for average, received in zip(averages, model.average_model.get_weights(), strict=True):
        np.testing.assert_allclose(received, average, rtol=0, atol=5e-7)


@pytest.mark.parametrize(("make", "compile_model"), MODELS.values(), ids=MODELS)
def test_the_users_test_step_runs_on_the_average_model(make, compile_model, batches):
    x = batches[0]
    model, _, _ = train(make, compile_model, x, wrap=True)
    for each in (model.raw_model, model.average_model):
        each.noise.state.assign([7, 0])
    logs = model.evaluate(x, batch_size=64, verbose=0, return_dict=True)
    bare = {}
    for prefix, each in (("", model.average_model), ("raw_", model.raw_model)):
        each.noise.state.assign([7, 0])
        alone = each.evaluate(x, batch_size=64, verbose=0, return_dict=True)
        bare.update({prefix + name: float(value) for name, value in alone.items()})
    assert {name: float(value) for name, value in logs.items()} == pytest.approx(bare)
    name = next(iter(bare))
    assert bare[name] != bare[f"raw_{name}"]


def test_a_model_with_a_compile_of_its_own_is_compiled_through_the_wrapper(batches):
    inner = Adversaries()
    compile_adversaries(inner)
    model = PolyakModel(inner)
    model.fit(batches[0], verbose=0)
    message = "Adversaries has a `compile` of its own.*PolyakModel"
    with pytest.raises(ValueError, match=message):
        model.evaluate(batches[0], verbose=0)
    with pytest.raises(ValueError, match=message):
        model.fit(batches[0], validation_data=(batches[0],), verbose=0)
    assert model.average_step == 2
    assert model.evaluate(batches[0], verbose=0, using="raw") > 0
    compile_adversaries(model)
    assert model.evaluate(batches[0], verbose=0) > 0


def test_the_optimizers_of_a_compile_of_ones_own_may_not_average():
    model = PolyakModel(Adversaries())
    with pytest.raises(ValueError, match="`optimizer` must not average by itself"):
        model.compile("adam", keras.optimizers.SGD(use_ema=True), "mse")
    assert not model.raw_model.compiled


@pytest.mark.parametrize("arguments", [{"inference": "ensemble"}, {"report": ("raw", "ensemble")}])
def test_an_ensemble_that_cannot_be_scored_is_refused_before_training(arguments, batches):
    x = batches[0]
    model = PolyakModel(Autoencoder(), **arguments)
    model.compile("adam")
    with pytest.raises(ValueError, match="Autoencoder has a `test_step` of its own"):
        model.fit(x, validation_data=(x,), verbose=0)
    assert model.average_step == 0
    model.fit(x, verbose=0)
    assert model.predict(x, using="ensemble", verbose=0).shape == (64, 6)


@keras.saving.register_keras_serializable(package="tests")
class SelfCompiled(keras.Sequential):
    """A classifier that compiles itself when it is made, as those of KerasHub do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compile()

    def compile(self, optimizer="adam", loss="mse", **kwargs):
        super().compile(optimizer=optimizer, loss=loss, **kwargs)


def test_a_model_that_compiles_itself_is_averaged_with_the_loss_it_was_given(batches):
    inner = SelfCompiled([keras.Input((6,)), keras.layers.Dense(3)])
    inner.compile(loss="mae", metrics=["mse"])
    model = PolyakModel(inner)
    x, y = batches[0], batches[0][:, :3]
    raw = model.evaluate(x, y, verbose=0, return_dict=True, using="raw")
    average = model.evaluate(x, y, verbose=0, return_dict=True)
    assert average == raw
    assert average["loss"] != average["mse"]


class BuiltByItsStep(keras.Model):
    """A model without `call`, whose part creates its weights in the first training step."""

    def __init__(self):
        super().__init__()
        self.network = keras.layers.Dense(3)

    def train_step(self, x):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self.network(x) - x) ** 2)
        weights = self.network.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("debias", [False, True])
def test_a_model_that_its_first_step_builds_is_averaged_from_the_first_step_on(debias, eagerly):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    kernels = []
    for wrap in (False, True):
        keras.utils.set_random_seed(2)
        raw = BuiltByItsStep()
        model = PolyakModel(raw, ExponentialAverage(0.5, debias=debias)) if wrap else raw
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=eagerly)
        recorder = Recorder(raw)
        model.fit(x, batch_size=8, shuffle=False, verbose=0, callbacks=[recorder])
        kernels.append(recorder.iterates)
    np.testing.assert_array_equal(kernels[1][-1][0], kernels[0][-1][0])
    assert model.average_step == 2
    first, last = kernels[1][0][0], kernels[1][1][0]
    if debias:
        expected = (first + 2 * last) / 3
    else:
        keras.utils.set_random_seed(2)
        unstepped = BuiltByItsStep()
        unstepped.network.build((None, 3))
        expected = unstepped.network.kernel / 4 + first / 4 + last / 2
    np.testing.assert_allclose(model.average_model.get_weights()[0], expected, rtol=1e-5)


class MadeInPieces(BuiltByItsStep):
    """A model of which a part and a weight of its own exist when it is wrapped."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.head = keras.layers.Dense(2)
        self.head.build((None, 3))
        self.norm = keras.layers.Normalization()


class MadeInPiecesWithCall(MadeInPieces):
    def call(self, inputs):
        return self.scale * self.head(self.network(inputs))


X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")


def train_in_pieces(make, prepare, wrap):
    keras.utils.set_random_seed(2)
    raw = make()
    model = PolyakModel(raw, UniformAverage()) if wrap else raw
    model.compile(keras.optimizers.SGD(0.1))
    prepare(model)
    recorder = Recorder(raw)
    model.fit(X, batch_size=8, shuffle=False, verbose=0, callbacks=[recorder])
    return model, recorder.iterates


@functools.cache
def iterates_of_bare_in_pieces(make, preparation):
    _, iterates = train_in_pieces(make, PREPARATIONS[preparation], wrap=False)
    return iterates


PREPARATIONS = {
    "nothing": lambda model: None,
    "built by hand": lambda model: model.build((None, 3)),
    "a part built by hand": lambda model: model.network.build((None, 3)),
    "a part adapted": lambda model: model.norm.adapt(X),
}


# Keras warns that the bare model, built by hand, has parts that are not.
@pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer 'made_in_pieces")
@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize(
    ("make", "preparation"),
    [
        *((MadeInPiecesWithCall, name) for name in PREPARATIONS),
        # Keras refuses to build a model without `call` by hand.
        *((MadeInPieces, name) for name in PREPARATIONS if name != "built by hand"),
    ],
)
def test_a_model_made_in_pieces_trains_as_bare_and_is_averaged(make, preparation, in_thread):
    prepare = PREPARATIONS[preparation]
    expected = iterates_of_bare_in_pieces(make, preparation)
    if in_thread:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            model, iterates = thread.submit(train_in_pieces, make, prepare, wrap=True).result()
    else:
        model, iterates = train_in_pieces(make, prepare, wrap=True)
    assert len(iterates) == model.average_step == 2
    for one, other in zip(expected[-1], iterates[-1], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other, average in zip(*iterates, model.average_model.get_weights(), strict=True):
        np.testing.assert_allclose(average, (one + other) / 2, rtol=1e-5, atol=1e-7)
