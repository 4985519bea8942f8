"""Tools that read, rebuild, plot and convert Keras models do so with a PolyakModel."""

import gc
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import LazyClassifier, compile_classifier, make_classifier, trained

from polyak_model import PolyakModel, UniformAverage, clone_model

ROUTES = ("average", "raw", "ensemble")


class Shifted(keras.Model):
    """A model that is built by its first call, with two tensors."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x, shift, training=None):
        return self.dense(x) + shift


X, SHIFT = np.ones((4, 3), "float32"), np.arange(8, dtype="float32").reshape(4, 2)
MODELS = {
    "functional": lambda: keras.Model(x := keras.Input((6,)), layers.Dense(3, "softmax")(x)),
    "sequential": make_classifier,
    "sequential without an input": lambda: keras.Sequential([layers.Dense(3, "softmax")]),
    "subclass": LazyClassifier,
}
EVERY_MODEL = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


# Building


@EVERY_MODEL
def test_a_build_config_rebuilds_what_a_checkpoint_is_loaded_into(make, batches, tmp_path):
    model = compile_classifier(PolyakModel(make()))
    assert model.built == model.raw_model.built
    model.fit(*batches, verbose=0)
    assert model.get_build_config() == model.raw_model.get_build_config()
    model.save_weights(tmp_path / "best.weights.h5")
    fresh = compile_classifier(PolyakModel(make()))
    fresh.build_from_config(json.loads(json.dumps(model.get_build_config())))
    fresh.load_weights(tmp_path / "best.weights.h5")
    for route in ROUTES:
        expected = model.predict(batches[0], verbose=0, using=route)
        np.testing.assert_array_equal(fresh.predict(batches[0], verbose=0, using=route), expected)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((X, SHIFT), {}), ((X,), {"shift": SHIFT}), ((), {"x": X, "shift": SHIFT})],
    ids=["by position", "by name", "all by name"],
)
def test_the_first_call_builds_with_all_its_arguments(args, kwargs, training, in_graph):
    model = PolyakModel(Shifted())

    def call():
        return model(*args, **kwargs, training=training)

    outputs = tf.function(call)() if in_graph else call()
    np.testing.assert_allclose(outputs, model.raw_model(X, SHIFT), rtol=1e-6)
    assert model.built
    assert model.get_build_config() == model.raw_model.get_build_config()
    np.testing.assert_array_equal(model.average_model(X, SHIFT), model.raw_model(X, SHIFT))


# Describing


@EVERY_MODEL
@pytest.mark.parametrize("name", ["inputs", "outputs", "input_shape", "output_shape"])
def test_inputs_and_outputs_are_those_of_the_raw_model_where_it_has_some(make, name, batches):
    bare, model = make(), PolyakModel(make())
    for each in (bare, model):
        each(batches[0])
    assert hasattr(model, name) == hasattr(bare, name)
    assert getattr(model, name, None) is getattr(model.raw_model, name, None) or (
        getattr(model, name) == getattr(model.raw_model, name)
    )


def summarize(model, **options):
    printed = []
    model.summary(print_fn=printed.append, **options)
    return "".join(printed)


@pytest.mark.parametrize("options", [{}, {"expand_nested": True, "show_trainable": True}])
def test_the_summary_is_that_of_the_raw_model_with_rule_step_and_size_of_the_average(
    options, batches
):
    model = trained(batches, average=UniformAverage())
    raw = summarize(model.raw_model, **options)
    shown = summarize(model, **options)
    assert shown.startswith(raw)
    count = sum(math.prod(weight.shape) for weight in model.raw_model.weights)
    assert shown.removeprefix(raw) == (
        " Average: UniformAverage(start_step=0, update_every=1), step 16, "
        f"{count} params ({4 * count:.2f} B)"
    )
    assert model.count_params() == 2 * count


def test_the_size_of_an_average_includes_what_it_stores_beside_its_weights():
    model = PolyakModel(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), compensated=True)
    assert summarize(model).endswith("8 params (64.00 B)")


def test_an_average_that_is_not_built_has_no_size(capsys):
    model = PolyakModel(LazyClassifier())
    model.summary()
    assert capsys.readouterr().out.endswith("step 0, not built\n")
    with pytest.raises(ValueError, match=r"`count_params\(\)` needs weights.*not built"):
        model.count_params()


def result_of(call):
    """Returns the type and the message of what a call raises, or None."""
    try:
        call()
    except ImportError as error:  # Of a tool that need not be installed.
        return type(error), str(error)


def test_a_model_is_plotted_where_keras_can_plot(tmp_path):
    model = PolyakModel(make_classifier())
    bare, wrapped = (
        result_of(lambda each=each: keras.utils.plot_model(each, tmp_path / "model.png"))
        for each in (model.raw_model, model)
    )
    assert wrapped == bare


# Converting


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
@pytest.mark.parametrize(
    ("kind", "route"),
    [("functional", "average"), ("sequential", "ensemble"), ("subclass", "raw")],
)
def test_a_converter_of_keras_models_converts_the_default_route(kind, route, batches):
    model = compile_classifier(PolyakModel(MODELS[kind](), inference=route))
    model.fit(*batches, verbose=0)
    content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    lite = tf.lite.Interpreter(model_content=content).get_signature_runner()
    x = batches[0][:1]
    (received,) = lite(args_0=x).values()
    np.testing.assert_allclose(received, model.predict(x, verbose=0), rtol=0, atol=1e-6)


# Quantizing


@pytest.mark.parametrize("changed", ["wrapper", "raw_model", "average_model"])
def test_quantizing_after_wrapping_is_refused_before_anything_changes(changed, batches):
    model = trained(batches)
    predictions = [model.predict(batches[0], verbose=0, using=route) for route in ROUTES]
    target = model if changed == "wrapper" else getattr(model, changed)
    with pytest.raises(ValueError, match=r"`raw_model`.*quantize it first, then wrap.*clone_model"):
        target.quantize("int8")
    for route, expected in zip(ROUTES, predictions, strict=True):
        np.testing.assert_array_equal(model.predict(batches[0], verbose=0, using=route), expected)
    model.fit(*batches, batch_size=64, verbose=0)
    assert model.average_step == 17


# Keras warns of each layer that cannot be quantized.
QUANTIZES = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")


@QUANTIZES
def test_a_copy_of_an_average_is_quantized(batches):
    model = trained(batches)
    before = model.average_model.get_weights()
    served = clone_model(model.average_model)
    served.quantize("int8")
    assert "int8" in [weight.dtype for weight in served.weights]
    for one, other in zip(before, model.average_model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@QUANTIZES
def test_a_raw_model_that_outlives_its_wrapper_is_quantized():
    raw = make_classifier()
    PolyakModel(raw)
    gc.collect()
    raw.quantize("int8")
    assert "int8" in [weight.dtype for weight in raw.weights]


def test_its_layers_are_those_of_the_raw_model():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="first")])
    model = PolyakModel(inner)
    assert model.layers == inner.layers
    assert model.get_layer("first") is inner.get_layer("first")
