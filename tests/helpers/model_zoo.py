"""Models of every kind that people train, small, compiled, and with data to train on."""

import keras
import numpy as np
from devices import add_second_device
from frameworks import BACKEND
from keras import layers
from keras.src.applications import mobilenet_v3
from keras.src.applications.convnext import ConvNeXt
from keras.src.applications.efficientnet import DEFAULT_BLOCKS_ARGS, EfficientNet
from kinds import Kind
from models import CROSSENTROPY, LazyClassifier, with_momentum
from models import compile_classifier as compile_with

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(32, 6)).astype("float32")
LABELS = GENERATOR.integers(0, 3, size=32)
VALUES = GENERATOR.normal(size=(32, 1)).astype("float32")
TOKENS = GENERATOR.integers(1, 10, size=(32, 5))
SEQUENCES = GENERATOR.normal(size=(32, 5, 3)).astype("float32")


def compile_classifier(model):
    """Compiles with momentum; some models are compiled with Adam instead."""
    return compile_with(model, with_momentum())


def make_dictionaries():
    """Makes a net from a dict of inputs to a dict of outputs, each with a loss of its own."""
    left, right = keras.Input((6,), name="left"), keras.Input((1,), name="right")
    hidden = layers.Dense(4, activation="relu")(layers.Concatenate()([left, right]))
    model = keras.Model(
        {"left": left, "right": right},
        {
            "kind": layers.Dense(3, activation="softmax", name="kind")(hidden),
            "value": layers.Dense(1, name="value")(hidden),
        },
    )
    model.compile(
        "adam",
        loss={"kind": CROSSENTROPY, "value": "mse"},
        loss_weights={"kind": 1.0, "value": 0.25},
        metrics={"kind": ["accuracy"], "value": ["mae"]},
    )
    return model


def make_lists():
    """Makes a net from a list of inputs to a list of outputs, each with a loss of its own."""
    left, right = keras.Input((6,)), keras.Input((1,))
    hidden = layers.Dense(4, activation="relu")(layers.Concatenate()([left, right]))
    outputs = [layers.Dense(3, activation="softmax")(hidden), layers.Dense(1)(hidden)]
    model = keras.Model([left, right], outputs)
    model.compile(
        "adam",
        loss=[CROSSENTROPY, "mse"],
        loss_weights=[1.0, 0.25],
        metrics=[["accuracy"], ["mae"]],
    )
    return model


def make_nested_structures():
    """Makes a net whose inputs and outputs are dicts of tuples."""
    inputs = {"pair": (keras.Input((6,)), keras.Input((6,))), "rest": {"one": keras.Input((1,))}}
    joined = layers.Concatenate()([*inputs["pair"], inputs["rest"]["one"]])
    hidden = layers.Dense(4, activation="relu")(joined)
    outputs = {
        "pair": (layers.Dense(3, activation="softmax")(hidden), layers.Dense(1)(hidden)),
        "one": layers.Dense(1)(hidden),
    }
    model = keras.Model(inputs, outputs)
    model.compile("adam", loss={"pair": (CROSSENTROPY, "mse"), "one": "mae"})
    return model


def make_shared_layer():
    """Makes a net that uses one layer twice."""
    inputs = keras.Input((6,))
    shared = layers.Dense(6, activation="relu")
    return compile_classifier(
        keras.Model(inputs, layers.Dense(3, activation="softmax")(shared(shared(inputs))))
    )


@keras.saving.register_keras_serializable(package="tests")
class Nest(keras.Model):
    """A subclass that holds a functional model that holds a Sequential."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inner = keras.Sequential([layers.Dense(4), layers.BatchNormalization(), layers.ReLU()])
        inputs = keras.Input((6,))
        self.body = keras.Model(inputs, layers.Add()([inner(inputs), layers.Dense(4)(inputs)]))
        self.head = layers.Dense(3, activation="softmax")

    def call(self, inputs, training=None):
        return self.head(self.body(inputs, training=training))


@keras.saving.register_keras_serializable(package="tests")
class Centre(layers.Layer):
    """Subtracts a running mean, and counts the batches it has seen and whether it has any."""

    def build(self, input_shape):
        shape = input_shape[-1:]
        self.mean = self.add_weight(shape=shape, initializer="zeros", trainable=False)
        self.count = self.add_weight(shape=(), dtype="int", initializer="zeros", trainable=False)
        self.seen = self.add_weight(shape=(), dtype="bool", initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        if training:
            batch = keras.ops.mean(inputs, axis=0)
            self.mean.assign(self.mean + 0.25 * (batch - self.mean))
            self.count.assign_add(1)
            self.seen.assign(True)
        return inputs - self.mean


def classifier(*parts):
    """Makes a compiled classifier with some layers below its softmax."""
    return compile_classifier(
        keras.Sequential([keras.Input((6,)), *parts, layers.Dense(3, activation="softmax")])
    )


@keras.saving.register_keras_serializable(package="tests")
class Squared(layers.Layer):
    """Adds the mean square of what passes through to the loss."""

    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def make_sequence_classifier(*parts):
    """Makes a classifier of sequences of vectors."""
    return compile_classifier(
        keras.Sequential([keras.Input((5, 3)), *parts, layers.Dense(3, activation="softmax")])
    )


def make_stateful():
    """Makes a classifier that carries its state from batch to batch."""
    return compile_classifier(
        keras.Sequential(
            [
                keras.Input(batch_shape=(8, 5, 3)),
                layers.LSTM(4, stateful=True),
                layers.Dense(3, activation="softmax"),
            ]
        )
    )


def make_token_classifier():
    """Makes a classifier of tokens, whose gradient is sparse; padding is masked."""
    return compile_with(
        keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                layers.Embedding(10, 4, mask_zero=True),
                layers.GRU(4),
                layers.Dense(3, activation="softmax"),
            ]
        ),
        "adam",  # It takes sparse gradients otherwise than SGD does.
    )


def dense(**arguments):
    return layers.Dense(4, activation="relu", **arguments)


IMAGES = GENERATOR.uniform(0, 255, size=(4, 32, 32, 3)).astype("float32")
add_second_device()
WORDS = np.array([["red", "blue", "green", "grey"][i % 4] for i in range(32)])
if BACKEND == "tensorflow":  # Others have no strings.
    WORDS = keras.ops.convert_to_tensor(WORDS)
NUMBERS = GENERATOR.integers(10, 15, size=(32, 1))


def make_reader(lookup, dtype, adapted_to=None):
    """Makes a classifier of words or numbers, looked up in a table."""
    if adapted_to is not None:
        lookup.adapt(adapted_to)
    inputs = keras.Input((1,), dtype=dtype)
    embedded = layers.Flatten()(layers.Embedding(8, 3)(lookup(inputs)))
    return compile_classifier(keras.Model(inputs, layers.Dense(3, activation="softmax")(embedded)))


def adapt(values):
    """Returns a function that adapts the layers of a model that can be."""

    def prepare(model):
        for layer in model.layers:
            if hasattr(layer, "adapt"):
                layer.adapt(values)

    return prepare


def make_text_classifier(adapted=False):
    """Makes a classifier of texts."""
    vectorization = layers.TextVectorization(max_tokens=8, output_sequence_length=2)
    if adapted:
        vectorization.adapt(WORDS)
    inputs = keras.Input((), dtype="string")
    # The oldest Keras does not know the length of the sequence, so it cannot flatten it.
    embedded = layers.Reshape((6,))(layers.Embedding(8, 3)(vectorization(inputs)))
    return compile_classifier(keras.Model(inputs, layers.Dense(3, activation="softmax")(embedded)))


def make_normalized(adapted=False):
    """Makes a classifier of inputs that are normalized first."""
    normalization = layers.Normalization()
    if adapted:
        normalization.adapt(3 * X + 1)
    return classifier(normalization, dense())


def mobile_blocks(x, kernel, activation, se_ratio):
    """Stacks a block that narrows, one without squeeze and excitation, and one with a shortcut."""
    block = mobilenet_v3._inverted_res_block
    x = block(x, 1, 16, 3, 2, se_ratio, mobilenet_v3.relu, 0)
    x = block(x, 4, 24, 3, 2, None, mobilenet_v3.relu, 1)
    return block(x, 4, 24, kernel, 1, se_ratio, activation, 2)


def make_application(name):
    """Makes an image classifier of keras.applications, with random weights.

    Each has the layers and blocks of its family, but fewer of them: tracing all takes minutes.
    """
    arguments = {"weights": None, "input_shape": (32, 32, 3), "classes": 3}
    if name == "MobileNetV3":
        model = mobilenet_v3.MobileNetV3(mobile_blocks, 64, model_type="small", **arguments)
    elif name == "EfficientNet":
        blocks = DEFAULT_BLOCKS_ARGS[:3]
        model = EfficientNet(1.0, 1.0, 32, blocks_args=blocks, name="efficientnet", **arguments)
    else:
        model = ConvNeXt(depths=[1, 1, 2, 1], projection_dims=[8, 16, 32, 64], **arguments)
    return compile_with(model, "sgd", run_eagerly=name != "MobileNetV3")


KINDS = {
    "dictionaries": Kind(
        make_dictionaries, {"left": X, "right": VALUES}, {"kind": LABELS, "value": VALUES}
    ),
    "lists": Kind(make_lists, [X, VALUES], [LABELS, VALUES]),
    "nested-structures": Kind(
        make_nested_structures,
        {"pair": (X, -X), "rest": {"one": VALUES}},
        {"pair": (LABELS, VALUES), "one": VALUES},
    ),
    "shared-layer": Kind(make_shared_layer, X, LABELS),
    "lazy-subclass": Kind(lambda: compile_classifier(LazyClassifier()), X, LABELS),
    "nested-models": Kind(lambda: compile_classifier(Nest()), X, LABELS),
    "non-trainable-state": Kind(lambda: classifier(Centre(), dense()), X, LABELS),
    "constraints": Kind(
        lambda: classifier(
            dense(kernel_constraint=keras.constraints.MaxNorm(0.5)),
            dense(kernel_constraint="non_neg"),
        ),
        X,
        LABELS,
    ),
    "penalties": Kind(
        lambda: classifier(dense(kernel_regularizer="l2", activity_regularizer="l1"), Squared()),
        X,
        LABELS,
        adds_losses=True,
    ),
    "dropout": Kind(lambda: classifier(dense(), layers.Dropout(0.4, seed=7)), X, LABELS),
    "noise": Kind(
        lambda: classifier(layers.GaussianNoise(0.5), dense(), layers.GaussianDropout(0.2)),
        X,
        LABELS,
    ),
    "spectral": Kind(lambda: classifier(layers.SpectralNormalization(dense()), dense()), X, LABELS),
    "recurrent": Kind(
        lambda: make_sequence_classifier(
            layers.Bidirectional(layers.GRU(3, return_sequences=True)),
            layers.LSTM(4, recurrent_dropout=0.2),
        ),
        SEQUENCES,
        LABELS,
    ),
    "stateful": Kind(make_stateful, SEQUENCES, LABELS),
    "sparse": Kind(make_token_classifier, TOKENS, LABELS),
    "adapted-normalization": Kind(lambda: make_normalized(adapted=True), X, LABELS),
    "normalization-adapted-later": Kind(make_normalized, X, LABELS, prepare=adapt(3 * X + 1)),
    "adapted-words": Kind(
        lambda: make_reader(layers.StringLookup(max_tokens=8), "string", WORDS),
        WORDS[:, None],
        LABELS,
    ),
    "words-adapted-later": Kind(
        lambda: make_reader(layers.StringLookup(max_tokens=8), "string"),
        WORDS[:, None],
        LABELS,
        prepare=adapt(WORDS),
    ),
    "adapted-numbers": Kind(
        lambda: make_reader(layers.IntegerLookup(max_tokens=8), "int64", NUMBERS), NUMBERS, LABELS
    ),
    "numbers-adapted-later": Kind(
        lambda: make_reader(layers.IntegerLookup(max_tokens=8), "int64"),
        NUMBERS,
        LABELS,
        prepare=adapt(NUMBERS),
    ),
    "adapted-text": Kind(lambda: make_text_classifier(adapted=True), WORDS, LABELS),
    "text-adapted-later": Kind(make_text_classifier, WORDS, LABELS, prepare=adapt(WORDS)),
}

APPLICATIONS = {
    name: Kind(lambda name=name: make_application(name), IMAGES, LABELS[:4], batch_size=2)
    for name in ("MobileNetV3", "EfficientNet", "ConvNeXt")
}
