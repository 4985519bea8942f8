"""The laws of averaging. Each test is named after the law it proves."""

import closed_forms
import keras
import numpy as np
import pytest
from frameworks import BACKEND, MAIN_MODE, compiled, in_modes
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from models import (
    CROSSENTROPY,
    LazyClassifier,
    Recorder,
    assert_close,
    assert_identical,
    compile_classifier,
    make_classifier,
    make_net_of_every_size,
    trained,
)

from polyak_model import ExponentialAverage, PolyakModel, UniformAverage, backend
from polyak_model.inference.ensemble import join

FEW = ("debiased", "biased", "late-and-rare")
SHIPPED = pytest.mark.parametrize(
    "mode", ["eager", "graph", "graph with shipped thresholds", "xla"], indirect=True
)


def by_rules(names, elsewhere):
    """Parametrizes a test by rules as people train, and by some of them in the other modes."""
    rules = {name: closed_forms.RULES[name] for name in names}
    return in_modes("rule", rules, elsewhere)


@pytest.fixture(scope="module")
def trained_once():
    """A wrapper that was fitted, for tests that only look at it."""
    generator = np.random.default_rng(0)
    return trained((generator.normal(size=(64, 6)), generator.integers(0, 3, size=64)))


@pytest.fixture
def walk():
    """A model, its weights, and a random walk from there."""
    model = make_classifier()
    generator = np.random.default_rng(0)
    path = [model.get_weights()]
    for _ in range(30):
        path.append([w + 0.1 * generator.normal(size=w.shape).astype("float32") for w in path[-1]])
    return model, path[0], path[1:]


def fit_recorded(model, batches, **kwargs):
    """Fits and returns the weights before the first step and after each one taken."""
    start = model.raw_model.get_weights()
    recorder = Recorder(model.raw_model)
    model.fit(*batches, batch_size=4, verbose=0, callbacks=[recorder], **kwargs)
    return start, recorder.iterates()


def compile_sgd(model, **mode):
    """Compiles with an optimizer that is traced and compiled quickly, for laws about averages."""
    model.compile(keras.optimizers.SGD(0.1), CROSSENTROPY, **mode)
    return model


# Law 1


@by_rules(FEW, elsewhere=["late-and-rare"])
def test_law_1_the_average_equals_the_closed_form_sum_of_the_iterates(rule, mode, batches):
    model = PolyakModel(compile_sgd(make_classifier(), **mode), rule)
    start, iterates = fit_recorded(model, batches)
    expected = closed_forms.average(rule, start, iterates)
    assert model.average_step == int(model.optimizer.iterations) == len(iterates) == 16
    assert_close(expected, model.average_model.get_weights(), ulps=4)


@by_rules(closed_forms.RULES, elsewhere=FEW)
def test_laws_1_and_2_hold_for_every_rule_in_a_training_loop_of_ones_own(rule, mode, walk):
    model, start, iterates = walk
    model = PolyakModel(model, rule)
    update = compiled(model.update_average, model.variables, **mode)
    # Law 2: constant weights are a fixed point, bit for bit.
    for _ in range(50):
        update()
    assert model.average_step == 50
    assert_identical(start, model.average_model.get_weights())
    # To compile another update would take most of the time of a test of law 1.
    model.reset_average()
    assert model.average_step == 0
    for iterate in iterates:
        model.raw_model.set_weights(iterate)
        update()
    expected = closed_forms.average(rule, start, iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=4)


# Under the mixed policies the weights have 32 bits as ever. What float16 adds, steps that loss
# scaling skips, law 4 is tested with in every mode.
@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        *(
            pytest.param(
                "float64",
                mode,
                marks=pytest.mark.skipif(BACKEND == "jax", reason="JAX: 32 bits"),
            )
            for mode in ("eager", "graph with shipped thresholds", "xla")
        ),
        ("mixed_bfloat16", "eager"),
        ("mixed_float16", MAIN_MODE),
    ],
    indirect=["mode"],
)
def test_law_1_holds_under_every_dtype_policy(policy, mode, batches):
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    keras.config.set_dtype_policy(policy)
    rule = ExponentialAverage(0.9)
    model = PolyakModel(compile_sgd(make_classifier(), **mode), rule)
    start, iterates = fit_recorded(model, batches)
    expected = closed_forms.average(rule, start, iterates)
    assert_close(
        expected, model.average_model.get_weights(), ulps=1e-8 if policy == "float64" else 4
    )


@SHIPPED
def test_law_1_holds_with_compensation_to_half_a_rounding(mode, batches):
    rule = UniformAverage()
    model = PolyakModel(compile_sgd(make_classifier(), **mode), rule, compensated=True)
    start, iterates = fit_recorded(model, batches)
    expected = closed_forms.average(rule, start, iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=0.6)


@pytest.mark.parametrize("mode", ["eager", "graph with shipped thresholds"], indirect=True)
@pytest.mark.parametrize(("compensated", "ulps"), [(False, 4), (True, 0.6)])
def test_laws_1_and_2_hold_for_variables_of_every_size(mode, compensated, ulps):
    inner, rule = make_net_of_every_size(), ExponentialAverage(0.9)
    generator = np.random.default_rng(0)
    start, *iterates = [
        [generator.uniform(0.5, 1.5, w.shape).astype("float32") for w in inner.weights]
        for _ in range(6)
    ]
    inner.set_weights(start)
    model = PolyakModel(inner, rule, compensated=compensated)
    update = compiled(model.update_average, model.variables, **mode)
    for _ in range(3):
        update()
    assert_identical(start, model.average_model.get_weights())
    for iterate in iterates:
        inner.set_weights(iterate)
        update()
    expected = closed_forms.average(rule, start, [start] * 3 + iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=ulps)


@settings(max_examples=15)
@given(
    path=st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=2, max_size=20
    ),
    name=st.sampled_from(sorted(closed_forms.RULES)),
)
def test_law_1_holds_on_any_trajectory(path, name):
    rule = closed_forms.RULES[name]
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(1, use_bias=False)])
    start, *iterates = [[np.array(point, "float32").reshape(3, 1)] for point in path]
    inner.set_weights(start)
    model = PolyakModel(inner, rule)
    for iterate in iterates:
        inner.set_weights(iterate)
        model.update_average()
    expected = closed_forms.average(rule, start, iterates)
    scale = max(np.abs(np.array(path)).max(), 1e-30)
    assert np.abs(expected[0] - model.shadow.first.model.get_weights()[0]).max() <= 1e-6 * scale


# Law 2


@by_rules(["debiased"], elsewhere=["debiased"])
def test_law_2_holds_while_fitting_at_a_learning_rate_of_zero(rule, mode, batches):
    inner = make_classifier()
    inner.layers[1].trainable = False  # Batch statistics would move.
    inner.compile(keras.optimizers.SGD(0.0), CROSSENTROPY, **mode)
    model = PolyakModel(inner, rule)
    start = inner.get_weights()
    model.fit(*batches, batch_size=4, verbose=0)
    assert model.average_step == 16
    assert_identical(start, inner.get_weights())
    assert_identical(start, model.average_model.get_weights())


# Law 3


def test_law_3_answering_saving_and_summarising_change_no_weight(batches, tmp_path, capsys):
    model = PolyakModel(
        compile_classifier(make_classifier()), 0.9, report=("average", "raw", "ensemble")
    )
    model.fit(*batches, batch_size=4, verbose=0)
    raw, average = model.raw_model.get_weights(), model.average_model.get_weights()
    x, y = batches
    for route in ("average", "raw", "ensemble"):
        model.evaluate(x, y, using=route, verbose=0)
        model.predict(x, using=route, verbose=0)
        model.test_on_batch(x, y, using=route)
        model.predict_on_batch(x, using=route)
        model.inference = route
        model.evaluate(x, y, verbose=0)
        model(x)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model.average_model.save(tmp_path / "average.keras")
    model.summary()
    assert_identical(raw, model.raw_model.get_weights())
    assert_identical(average, model.average_model.get_weights())
    assert " Average: Exponential" in capsys.readouterr().out


# Law 4


# The tests of law 1 are about optimizers that take a step with every batch.
def test_law_4_the_average_moves_once_per_optimizer_step(mode, batches):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    rule = UniformAverage()
    model = PolyakModel(compile_classifier(make_classifier(), optimizer, **mode), rule)
    start, stepped = fit_recorded(model, batches)
    assert len(stepped) == 4
    assert model.average_step == len(stepped) == int(optimizer.iterations)
    assert_close(
        closed_forms.average(rule, start, stepped), model.average_model.get_weights(), ulps=4
    )


def test_law_4_the_average_rests_on_a_step_that_loss_scaling_skips(mode, batches):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = np.copy(batches[0]), batches[1]
    x[4:8] = np.inf  # The gradients of the second batch overflow.
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(3, dtype="mixed_float16")])
    inner.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **mode)
    rule = UniformAverage()
    model = PolyakModel(inner, rule)
    start, stepped = fit_recorded(model, (x, y), shuffle=False)
    assert isinstance(inner.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.average_step == len(stepped) == 15
    assert_close(
        closed_forms.average(rule, start, stepped), model.average_model.get_weights(), ulps=4
    )


# Law 5


def test_law_5_one_long_fit_gives_what_several_short_ones_give(batches):
    models, rule = [], closed_forms.RULES["late-and-rare"]
    for calls, epochs in ((1, 4), (4, 1)):
        model = PolyakModel(compile_classifier(make_classifier()), rule)
        for _ in range(calls):
            model.fit(*batches, batch_size=16, epochs=epochs, verbose=0, shuffle=False)
        models.append(model)
    assert models[0].average_step == models[1].average_step == 16
    assert_identical(models[0].raw_model.get_weights(), models[1].raw_model.get_weights())
    assert_identical(models[0].average_model.get_weights(), models[1].average_model.get_weights())


@pytest.mark.skipif(BACKEND == "torch", reason="Keras takes one step per execution on PyTorch")
def test_law_5_several_steps_per_execution_give_what_single_ones_give(batches):
    models = []
    for steps in (1, 4):
        inner = compile_classifier(make_classifier(), steps_per_execution=steps)
        model = PolyakModel(inner, 0.9)
        model.fit(*batches, batch_size=4, verbose=0, shuffle=False)
        models.append(model)
    assert models[0].average_step == models[1].average_step == 16
    assert_identical(models[0].average_model.get_weights(), models[1].average_model.get_weights())


# Law 6


def state(model):
    """Everything that training goes on from, the seeds of dropout included."""
    variables = [*model.variables, *model.average_model.variables, *model.optimizer.variables]
    return [model.average_step, *(variable.numpy() for variable in variables)]


def test_law_6_save_load_continue_gives_what_never_stopping_gives(batches, tmp_path):
    def make():
        inner = compile_classifier(make_classifier())
        return PolyakModel(inner, closed_forms.RULES["late-and-rare"], compensated=True)

    def fit(model):
        model.fit(*batches, batch_size=16, shuffle=False, verbose=0)
        return model

    never_stopped = fit(make())
    never_stopped.save(tmp_path / "model.keras")
    never_stopped.save_weights(tmp_path / "model.weights.h5")
    saved = state(never_stopped)
    expected = state(fit(never_stopped))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    filled = make()
    filled.load_weights(tmp_path / "model.weights.h5")
    for model in (loaded, filled):
        assert model.shadow.first.rule == never_stopped.shadow.first.rule
        assert_identical(state(model), saved)
        assert_identical(state(fit(model)), expected)


# Law 7


def test_law_7_raw_and_average_share_no_variable(trained_once):
    model = trained_once
    raw = {id(v) for v in model.raw_model.variables}
    raw_buffers = {id(v.value) for v in model.raw_model.variables}
    assert model.average_model.variables
    for variable in model.average_model.variables:
        assert id(variable) not in raw
        assert id(variable.value) not in raw_buffers


def test_law_7_the_average_is_never_trainable_even_after_unfreezing_the_wrapper(trained_once):
    model = trained_once
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert {id(v) for v in model.trainable_variables} == {
        id(v) for v in model.raw_model.trainable_variables
    }
    assert not model.average_model.trainable_variables


def test_law_7_the_optimizer_never_sees_the_average(trained_once):
    model = trained_once
    # Adam keeps its step, its rate and two moments for each trained variable.
    assert len(model.optimizer.variables) == 2 + 2 * len(model.raw_model.trainable_variables)


def test_law_7_the_average_adds_no_losses_of_its_own(trained_once, batches):
    model = trained_once
    model(batches[0], training=True)
    model(batches[0], training=False)
    assert len(model.losses) == 1
    assert not model.average_model.losses


# Law 8


class Counter(layers.Layer):
    """Holds an integer, a boolean and a random seed beside a float weight."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.seen = self.add_weight(shape=(), dtype="bool", initializer="zeros", trainable=False)
        self.noise = keras.random.SeedGenerator(3)

    def call(self, inputs, training=None):
        if training:
            self.calls.assign_add(3)
            self.seen.assign(True)
            inputs = inputs + keras.random.normal(keras.ops.shape(inputs), seed=self.noise)
        return inputs * self.scale


@pytest.mark.parametrize("mode", ["eager", "graph"], indirect=True)
def test_law_8_integers_and_booleans_are_copied_and_seeds_left_alone(mode, batches):
    inner = keras.Sequential([keras.Input((6,)), Counter(), layers.Dense(3, activation="softmax")])
    model = PolyakModel(compile_classifier(inner, **mode), ExponentialAverage(0.9, debias=False))
    seed = model.average_model.layers[0].noise.state.numpy()
    model.fit(*batches, batch_size=4, verbose=0)
    raw, average = inner.layers[0], model.average_model.layers[0]
    assert int(raw.calls) == int(average.calls) == 48
    assert raw.seen.numpy()
    assert average.seen.numpy()
    assert raw.scale.numpy() != average.scale.numpy()
    np.testing.assert_array_equal(average.noise.state.numpy(), seed)
    assert not np.array_equal(raw.noise.state.numpy(), seed)


# Law 9


def test_law_9_before_the_first_step_the_average_predicts_what_the_raw_model_does(batches):
    x, _ = batches
    inner = make_classifier()
    expected = inner.predict(x, verbose=0)
    model = PolyakModel(inner)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (model(x), inner(x))))


@pytest.mark.parametrize("rule", [closed_forms.RULES[name] for name in ("biased", "late-and-rare")])
def test_law_9_holds_for_weights_loaded_after_wrapping(rule, batches):
    x, y = batches
    model = PolyakModel(compile_classifier(make_classifier()), rule)
    model.predict(x, verbose=0)
    loaded = make_classifier(seed=2).get_weights()
    model.raw_model.set_weights(loaded)
    assert_identical(loaded, model.average_model.get_weights())
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), model.raw_model.predict(x, verbose=0)
    )
    start, iterates = fit_recorded(model, (x, y))
    assert_identical(loaded, start)
    assert_close(
        closed_forms.average(rule, start, iterates), model.average_model.get_weights(), ulps=4
    )


def test_law_9_holds_for_a_model_built_by_its_first_batch(batches):
    x, y = batches
    model = PolyakModel(compile_classifier(LazyClassifier()), ExponentialAverage(0.9, debias=False))
    predicted = model.predict(x, verbose=0)
    np.testing.assert_array_equal(predicted, model.raw_model.predict(x, verbose=0))
    start, iterates = fit_recorded(model, (x, y))
    expected = closed_forms.average(model.shadow.first.rule, start, iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=4)


# Law 10


def make_lazy_sequential():
    return keras.Sequential(
        [layers.Dense(5, activation="relu"), layers.Dropout(0.5), layers.Dense(3, "softmax")]
    )


class Logbook(keras.callbacks.Callback):
    """Records the logs of every batch and epoch."""

    def __init__(self):
        super().__init__()
        self.pages = []

    def on_train_batch_end(self, batch, logs=None):
        self.pages.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        self.pages.append(dict(logs))


def train_for_law_10(make, batches, wrap, **mode):
    keras.utils.set_random_seed(5)
    inner = make()
    compile_classifier(inner, keras.optimizers.Adam(0.01, weight_decay=0.01), **mode)
    model = PolyakModel(inner, 0.9, inference="raw") if wrap else inner
    logbook = Logbook()
    plateau = keras.callbacks.ReduceLROnPlateau(patience=0, min_delta=10.0)
    model.fit(
        *batches,
        batch_size=12,
        epochs=3,
        verbose=0,
        validation_data=batches,
        callbacks=[logbook, plateau],
    )
    return inner, logbook.pages


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        *((make_classifier, mode) for mode in ("eager", "graph", "xla")),
        (LazyClassifier, "xla" if BACKEND == "jax" else "graph"),
        (make_lazy_sequential, "eager"),
    ],
    indirect=["mode"],
)
def test_law_10_the_wrapper_trains_exactly_as_the_bare_model_does(make, mode, batches):
    bare, bare_logs = train_for_law_10(make, batches, wrap=False, **mode)
    inner, logs = train_for_law_10(make, batches, wrap=True, **mode)
    if mode.get("jit_compile") and BACKEND == "tensorflow":
        assert_close(bare.get_weights(), inner.get_weights(), ulps=64)
    else:
        assert_identical(bare.get_weights(), inner.get_weights())
        assert_identical(
            [v.numpy() for v in bare.optimizer.variables],
            [v.numpy() for v in inner.optimizer.variables],
        )
        assert bare_logs == logs


def test_law_10_wrapping_leaves_the_random_state_of_later_layers_alone():
    seeds = []
    for wrap in (False, True):
        inner = make_classifier()
        if wrap:
            PolyakModel(inner)
        dropout = layers.Dropout(0.5).seed_generator.state.numpy().tolist()
        seeds.append([dropout, layers.Dense(2).kernel_initializer.seed])
    assert seeds[0] == seeds[1]


# Law 11


@settings(max_examples=50)
@given(
    logits=st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=2, max_size=2),
    label=st.integers(0, 3),
)
def test_law_11_mean_probabilities_lose_no_more_than_the_mean_of_the_losses(logits, label):
    with backend.double_precision():
        tensors = [keras.ops.convert_to_tensor([row], "float64") for row in logits]
        probabilities = [keras.ops.softmax(tensor) for tensor in tensors]
        joined = np.asarray(join("mean", probabilities))

    def loss(p):
        return -np.log(np.asarray(p)[0, label])

    assert (
        loss(joined) <= (loss(probabilities[0]) + loss(probabilities[1])) / 2 * (1 + 1e-12) + 1e-12
    )


def test_law_11_holds_for_the_ensemble_of_a_trained_model(batches):
    x, y = batches
    model = trained(batches, epochs=3, report=("average", "raw", "ensemble"))
    model.raw_model.layers[0].kernel.regularizer = None
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert logs["ensemble_loss"] <= (logs["loss"] + logs["raw_loss"]) / 2 + 1e-6
