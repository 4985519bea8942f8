"""What only PyTorch has: gradients on variables, modules, devices by name, torch.compile."""

import concurrent.futures
import copy
import functools
import pickle
import threading

import closed_forms
import keras
import numpy as np
import pytest
from models import (
    Recorder,
    assert_close,
    assert_identical,
    compile_classifier,
    make_classifier,
)

from polyak_model import (
    ExponentialAverage,
    PolyakModel,
    PowerAverage,
    UniformAverage,
    clone_model,
)

if keras.backend.backend() != "torch":
    pytest.skip("for PyTorch", allow_module_level=True)

import torch

X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")


class CustomStep(keras.Model):
    """A training step as PyTorch's users write it."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(5, activation="relu")
        self.dropout = keras.layers.Dropout(0.3)
        self.head = keras.layers.Dense(3, activation="softmax")

    def call(self, x, training=None):
        return self.head(self.dropout(self.hidden(x), training=training))

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        outputs = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=outputs)
        loss.backward()
        weights = self.trainable_weights
        gradients = [weight.value.grad for weight in weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, outputs)
        return {metric.name: metric.result() for metric in self.metrics}


def trained(batches, average=0.9, **kwargs):
    model = PolyakModel(compile_classifier(make_classifier()), average, **kwargs)
    model.fit(*batches, batch_size=8, verbose=0)
    return model


def fit_recorded(model, batches, **kwargs):
    """Fits and returns the weights before the first step and after each one taken."""
    start, recorder = model.raw_model.get_weights(), Recorder(model.raw_model)
    model.fit(*batches, batch_size=8, verbose=0, callbacks=[recorder], **kwargs)
    return start, recorder.iterates()


def parameters_of(model):
    return {id(parameter) for parameter in model.parameters()}


def test_a_custom_step_trains_as_it_does_bare(batches):
    def fit(wrap):
        keras.utils.set_random_seed(3)
        inner = compile_classifier(CustomStep())
        model = PolyakModel(inner, UniformAverage()) if wrap else inner
        history = model.fit(*batches, batch_size=8, epochs=2, verbose=0)
        return inner.get_weights(), history.history

    (expected, logs), (received, wrapped_logs) = fit(False), fit(True)
    assert_identical(expected, received)
    assert logs == wrapped_logs


class Adversarial(keras.Model):
    """Two nets and their optimizers, trained in turns by a step of their own."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((2,)), keras.layers.Dense(6)])
        self.critic = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, use_bias=False)])
        self.critic_optimizer = keras.optimizers.RMSprop(0.01)

    def call(self, x):
        return self.critic(self.generator(x[:, :2]))

    def train_step(self, data):
        x, _ = data
        losses = {}
        for net, optimizer, sign in (
            (self.critic, self.critic_optimizer, 1),
            (self.generator, self.optimizer, -1),
        ):
            self.zero_grad()
            loss = sign * (self(x) - self.critic(x)).mean()
            loss.backward()
            weights = net.trainable_weights
            with torch.no_grad():
                optimizer.apply([weight.value.grad for weight in weights], weights)
            losses[net.name] = loss.detach()
        return dict(zip(("critic_loss", "generator_loss"), losses.values(), strict=True))


def test_a_step_of_two_optimizers_trains_as_it_does_bare_and_moves_both_averages(batches):
    def fit(wrap):
        keras.utils.set_random_seed(3)
        inner = Adversarial()
        model = PolyakModel(inner, UniformAverage()) if wrap else inner
        model.compile(keras.optimizers.Adam(0.01))
        iterates = []
        record = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: iterates.append(inner.get_weights())
        )
        history = model.fit(*batches, batch_size=8, epochs=2, verbose=0, callbacks=[record])
        return model, iterates, history.history

    (_, expected, logs), (model, received, wrapped_logs) = fit(False), fit(True)
    for one, other in zip(expected, received, strict=True):
        assert_identical(one, other)
    assert logs == wrapped_logs
    assert not any(map(np.array_equal, expected[0], expected[-1]))
    # Each batch takes a step of both optimizers, after which the average moves once.
    assert model.average_step == 16
    mean = [np.mean(values, axis=0) for values in zip(*received, strict=True)]
    assert_close(mean, model.average_model.get_weights(), ulps=8)


def test_a_custom_step_moves_the_average(batches):
    rule = UniformAverage()
    model = PolyakModel(compile_classifier(CustomStep()), rule)
    model.build((None, 6))
    start, iterates = fit_recorded(model, batches)
    expected = closed_forms.average(rule, start, iterates)
    assert_close(expected, model.average_model.get_weights(), ulps=4)


@pytest.mark.parametrize("start_step", [0, 10**6])
def test_predictions_beside_a_fit_leave_the_average_and_the_logs_alone(start_step, batches):
    def fit(action):
        keras.utils.set_random_seed(3)
        layers = [keras.Input((6,)), keras.layers.Dense(5), keras.layers.Dropout(0.3, seed=5)]
        inner = keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax")])
        model = PolyakModel(compile_classifier(inner), UniformAverage(start_step))
        done = threading.Event()

        def repeat():
            while not done.is_set():
                action(model)

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            beside = thread.submit(repeat)
            try:
                history = model.fit(*batches, batch_size=4, epochs=4, shuffle=False, verbose=0)
            finally:
                done.set()
            beside.result()
        return history.history, model.average_model.get_weights()

    def predict(model):
        for route in ("average", "raw", "ensemble"):
            model.predict(X, using=route, verbose=0)

    (logs, expected), (logs_beside, received) = fit(lambda model: None), fit(predict)
    assert logs == logs_beside
    assert_identical(expected, received)


def test_only_the_raw_weights_take_gradients(batches):
    model = trained(batches)
    expected = parameters_of(model.raw_model)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(v.value) for v in model.raw_model.trainable_variables}
    assert trainable < expected < parameters_of(model)
    assert not model.average_model(X).requires_grad


def test_the_modules_of_a_clone_hold_its_own_parameters(batches):
    model = trained(batches).raw_model
    clone = clone_model(model)
    assert parameters_of(clone) == {id(variable.value) for variable in clone.variables}
    assert parameters_of(clone).isdisjoint(parameters_of(model))
    assert [*clone.state_dict()] == [*model.state_dict()]


def test_a_long_chain_of_modules_needs_no_deep_stack():
    inputs = outputs = keras.Input((2,))
    for _ in range(200):
        outputs = keras.layers.Identity()(outputs)
    clone = clone_model(keras.Model(inputs, outputs))
    assert len(clone.layers) == 201


def test_a_module_of_pytorch_is_averaged(batches):
    x, y = batches
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    inner = keras.Sequential([keras.Input((6,)), keras.layers.TorchModuleWrapper(module)])
    inner.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rule = UniformAverage()
    model = PolyakModel(inner, rule)
    start, iterates = fit_recorded(model, (x, y))
    average = model.average_model.layers[0].module
    expected = closed_forms.average(rule, start, iterates)
    assert_close(expected, [p.numpy() for p in average.parameters()], ulps=4)
    with torch.no_grad():
        outputs = average(torch.tensor(X)).numpy()
    np.testing.assert_array_equal(outputs, model.predict(X, verbose=0))


def test_running_statistics_that_keras_does_not_know_are_refused():
    wrapper = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="BatchNorm1d keeps running statistics"):
        PolyakModel(keras.Sequential([keras.Input((6,)), wrapper]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_of_a_wrapper_are_equal_and_share_nothing(duplicate, batches):
    model = trained(batches)
    other = duplicate(model)
    assert other.average_step == model.average_step == 8
    assert_identical(model.get_weights(), other.get_weights())
    assert parameters_of(other).isdisjoint(parameters_of(model))
    other.fit(*batches, batch_size=8, verbose=0)
    assert (other.average_step, model.average_step) == (16, 8)


def test_a_state_dict_restores_raw_and_average_weights(batches):
    model = trained(batches)
    other = PolyakModel(compile_classifier(make_classifier(seed=2)), 0.9)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Names contain those of the layers, which Keras counts.
    other.load_state_dict(dict(zip(other.state_dict(), state.values(), strict=True)))
    assert other.average_step == model.average_step
    assert_identical(model.get_weights(), other.get_weights())


def test_every_variable_of_two_wrappers_in_a_larger_model_has_a_path_of_its_own():
    average = {"short": 0.9, "long": UniformAverage()}
    parts = [PolyakModel(make_classifier(), average, compensated=True) for _ in range(2)]
    x = keras.Input((6,))
    whole = keras.Model(x, keras.layers.Add()([part(x) for part in parts]))
    whole.compile("adam", "mse")
    paths = [variable.path for variable in whole.variables]
    assert len({*paths}) == len(paths)
    tree = whole.get_state_tree(value_format="numpy_array")["non_trainable_variables"]
    assert [tree[part.name]["average"]["step"] for part in parts] == [0, 0]


def test_a_state_dict_of_a_larger_model_holds_every_weight_of_its_parts(batches):
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    part = PolyakModel(inner, UniformAverage())
    larger = keras.Sequential([keras.Input((6,)), part])
    larger.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    larger.fit(*batches, batch_size=16, verbose=0)
    assert part.average_step == 4
    expected, state = larger.get_weights(), copy.deepcopy(larger.state_dict())
    assert {id(variable.value) for variable in part.variables} <= parameters_of(larger)
    larger.fit(*batches, batch_size=16, verbose=0)
    larger.load_state_dict(state)
    assert part.average_step == 4
    assert_identical(expected, larger.get_weights())


def test_an_average_inside_a_larger_model_of_mixed_precision_is_updated_in_place(batches):
    x, y = batches
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    part = PolyakModel(inner, UniformAverage())
    larger = keras.Sequential([keras.Input((6,)), part], name="larger")
    larger.dtype_policy = "mixed_bfloat16"
    larger.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    iterates = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: iterates.append(inner.get_weights())
    )
    larger.fit(x, y, batch_size=16, verbose=0, callbacks=[record])
    assert part.average_step == len(iterates) == 4
    expected = [np.mean(values, axis=0) for values in zip(*iterates, strict=True)]
    assert_close(expected, part.average_model.get_weights(), ulps=4)


def test_an_average_is_where_its_device_says(batches):
    model = trained(batches, device="CPU:0")
    assert {str(p.device) for p in model.average_model.parameters()} == {"cpu"}
    assert model.get_config()["device"] == "CPU:0"
    assert_identical(trained(batches).get_weights(), model.get_weights())


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda:9", "where PyTorch fails"), ("desk", "where PyTorch fails"), ("meta", "stores values")],
)
def test_a_device_that_cannot_be_used_is_refused(device, reason):
    inner = make_classifier()
    with pytest.raises(ValueError, match=reason):
        PolyakModel(inner, device=device)


@pytest.mark.parametrize("wrap", [lambda model: model, PolyakModel], ids=["bare", "wrapped"])
def test_keras_trains_no_stateful_recurrent_layer_bare_or_wrapped(wrap):
    # It overwrites the state that the gradient of the same step needs.
    layers = [keras.Input(batch_shape=(8, 5, 3)), keras.layers.LSTM(4, stateful=True)]
    model = wrap(keras.Sequential(layers))
    model.compile("sgd", "mse")
    x = np.ones((8, 5, 3), "float32")
    assert np.isfinite(model.evaluate(x, x[:, 0, :1], verbose=0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model.fit(x, x[:, 0, :1], batch_size=8, verbose=0)


def test_several_steps_per_execution_are_refused_as_by_keras(batches):
    model = PolyakModel(compile_classifier(make_classifier(), steps_per_execution=4))
    with pytest.raises(ValueError, match="`steps_per_execution` must be 1 with the PyTorch"):
        model.fit(*batches, batch_size=4, verbose=0)


def test_a_model_that_only_its_first_step_builds_is_refused():
    class Parts(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def train_step(self, data):
            return {"loss": self.dense(data[0]).sum()}

    model = PolyakModel(Parts())
    model.compile("sgd")
    with pytest.raises(ValueError, match="whose weights are created by its first training step"):
        model.train_on_batch(X, X)


def make_linear():
    """Makes a model that the default compiler compiles in seconds."""
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, activation="softmax")])


@pytest.mark.slow
# The compiler looks at the gradients of all tensors, and imports modules of its own that warn.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "compiler"),
    # For the first, the graph is captured as for the default compiler, which takes a minute.
    [(make_classifier, "eager"), (make_linear, "inductor")],
)
def test_compiled_training_gives_what_bare_compiled_training_gives(
    make, compiler, batches, monkeypatch
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    bare = compile_classifier(make(), jit_compile=True)
    bare.fit(*batches, batch_size=8, verbose=0, shuffle=False)
    rules = {"exponential": ExponentialAverage(0.9), "power": PowerAverage(gamma=3)}
    model = PolyakModel(compile_classifier(make(), jit_compile=True), rules)
    start, iterates = fit_recorded(model, batches, shuffle=False)
    if compiler == "eager":
        assert_identical(bare.get_weights(), model.raw_model.get_weights())
    else:  # It orders operations anew in each compilation: law 10 holds to rounding, as under XLA.
        assert_close(bare.get_weights(), model.raw_model.get_weights(), ulps=8)
    for name, rule in rules.items():
        expected = closed_forms.average(rule, start, iterates)
        assert_close(expected, model.average_models[name].get_weights(), ulps=4)


@pytest.mark.parametrize("route", ["average", "raw", "ensemble"])
def test_a_route_is_exported_for_pytorch(route, batches, tmp_path):
    model = trained(batches)
    path = tmp_path / "model.pt2"
    model.export(path, format="torch", using=route, input_signature=[keras.InputSpec(shape=(8, 6))])
    served = torch.export.load(path).module()(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(served, model.predict(X, using=route, verbose=0), atol=1e-6)


# The older exporter of PyTorch, to which Keras falls back, warns of much.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("format", "name"), [("tf_saved_model", "model"), ("onnx", "model.onnx"), ("openvino", "m.xml")]
)
def test_a_format_that_needs_another_package_is_refused_by_its_name(
    format, name, batches, tmp_path
):
    model = trained(batches)
    package = format.removeprefix("tf_saved_model") or "tensorflow"
    with pytest.raises((ImportError, torch.onnx.errors.OnnxExporterError), match=package):
        model.export(str(tmp_path / name), format=format)
    assert not [*tmp_path.iterdir()]


def test_keras_itself_cannot_use_several_devices_on_pytorch():
    # Once it can, the table in notebook 07 needs another row, and laws on several devices.
    for call in (
        keras.distribution.list_devices,
        lambda: keras.distribution.set_distribution(keras.distribution.DataParallel()),
    ):
        with pytest.raises((AttributeError, NotImplementedError)):
            call()
