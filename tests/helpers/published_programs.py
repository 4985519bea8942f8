"""Small programs of the kinds that Keras publishes, as people write them.

Each is a function `(wrap) -> (model, arguments of fit)`; `wrap` is the one line that changes.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(size=(24, 8, 8, 1)).astype("float32")
VECTORS = GENERATOR.normal(size=(24, 6)).astype("float32")
LABELS = GENERATOR.integers(0, 3, size=24)
TEXTS = np.array([" ".join(GENERATOR.choice(["red", "blue", "green"], 4)) for _ in range(24)])


def step(optimizer, model, tape, loss):
    """Takes an optimizer's step for the trainable weights of a model."""
    weights = model.trainable_weights
    optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))


def make_encoder(outputs):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(outputs),
        ]
    )


def make_decoder(width):
    return keras.Sequential(
        [
            keras.Input((width,)),
            layers.Dense(4 * 4 * 2, activation="relu"),
            layers.Reshape((4, 4, 2)),
            layers.Conv2DTranspose(1, 3, strides=2, padding="same", activation="sigmoid"),
        ]
    )


class Sampling(layers.Layer):
    """Draws from a normal distribution."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(1)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.generator)
        return mean + ops.exp(0.5 * log_variance) * noise


class VariationalAutoencoder(keras.Model):
    """Takes its two nets, and has neither `call` nor `get_config`."""

    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.decoder = decoder
        self.loss_tracker = keras.metrics.Mean(name="total")

    @property
    def metrics(self):
        return [self.loss_tracker]

    def train_step(self, images):
        with tf.GradientTape() as tape:
            mean, log_variance, z = self.encoder(images)
            difference = ops.mean((self.decoder(z) - images) ** 2)
            divergence = ops.mean(mean**2 + ops.exp(log_variance) - log_variance - 1)
            loss = difference + 0.1 * divergence
        step(self.optimizer, self, tape, loss)
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def variational_autoencoder(wrap):
    inputs = keras.Input((8, 8, 1))
    hidden = make_encoder(4)(inputs)
    mean, log_variance = layers.Dense(2)(hidden), layers.Dense(2)(hidden)
    encoder = keras.Model(inputs, [mean, log_variance, Sampling()([mean, log_variance])])
    model = wrap(VariationalAutoencoder(encoder, make_decoder(2)))
    model.compile(optimizer=keras.optimizers.Adam())
    return model, {"x": IMAGES}


class WassersteinGAN(keras.Model):
    """Takes nets and numbers; penalizes the gradient; its `compile` takes losses and optimizers."""

    def __init__(self, critic, generator, width, critic_steps=2, penalty_weight=10.0):
        super().__init__()
        self.critic = critic
        self.generator = generator
        self.width = width
        self.critic_steps = critic_steps
        self.penalty_weight = penalty_weight
        self.seeds = keras.random.SeedGenerator(2)

    def compile(self, critic_optimizer, generator_optimizer, critic_loss, generator_loss):
        # In a graph, two bare runs differ in the order in which gradients are summed.
        super().compile(run_eagerly=True)
        self.critic_optimizer = critic_optimizer
        self.generator_optimizer = generator_optimizer
        self.critic_loss = critic_loss
        self.generator_loss = generator_loss

    def imagine(self, count):
        noise = keras.random.normal((count, self.width), seed=self.seeds)
        return self.generator(noise, training=True)

    def penalty(self, real, fake, count):
        share = keras.random.uniform((count, 1, 1, 1), seed=self.seeds)
        between = real + share * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(between)
            scores = self.critic(between, training=True)
        gradient = tape.gradient(scores, between)
        return ops.mean((ops.sqrt(ops.sum(gradient**2, axis=(1, 2, 3)) + 1e-12) - 1) ** 2)

    def train_step(self, real):
        count = ops.shape(real)[0]
        for _ in range(self.critic_steps):
            with tf.GradientTape() as tape:
                fake = self.imagine(count)
                loss = self.critic_loss(self.critic(real), self.critic(fake))
                loss += self.penalty_weight * self.penalty(real, fake, count)
            step(self.critic_optimizer, self.critic, tape, loss)
        with tf.GradientTape() as tape:
            generator_loss = self.generator_loss(self.critic(self.imagine(count)))
        step(self.generator_optimizer, self.generator, tape, generator_loss)
        return {"critic_loss": loss, "generator_loss": generator_loss}


def wasserstein_gan(wrap):
    critic = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(8, "leaky_relu"), layers.Dense(1)]
    )
    model = wrap(WassersteinGAN(critic, make_decoder(2), width=2))
    model.compile(
        critic_optimizer=keras.optimizers.Adam(1e-3, beta_1=0.5),
        generator_optimizer=keras.optimizers.Adam(1e-3, beta_1=0.5),
        critic_loss=lambda real, fake: ops.mean(fake) - ops.mean(real),
        generator_loss=lambda fake: -ops.mean(fake),
    )
    return model, {"x": IMAGES}


class ConvolutionalGAN(keras.Model):
    """Its `compile` makes metrics."""

    def __init__(self, discriminator, generator, width):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.width = width
        self.seeds = keras.random.SeedGenerator(3)

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = loss_fn
        self.d_metric = keras.metrics.Mean(name="d_loss")
        self.g_metric = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_metric, self.g_metric]

    def train_step(self, real):
        count = ops.shape(real)[0]
        noise = keras.random.normal((count, self.width), seed=self.seeds)
        ones, zeros = ops.ones((count, 1)), ops.zeros((count, 1))
        both = ops.concatenate([self.generator(noise), real])
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(ops.concatenate([ones, zeros]), self.discriminator(both))
        step(self.d_optimizer, self.discriminator, tape, d_loss)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(zeros, self.discriminator(self.generator(noise)))
        step(self.g_optimizer, self.generator, tape, g_loss)
        self.d_metric.update_state(d_loss)
        self.g_metric.update_state(g_loss)
        return {metric.name: metric.result() for metric in self.metrics}


def convolutional_gan(wrap):
    model = wrap(ConvolutionalGAN(make_encoder(1), make_decoder(3), width=3))
    model.compile(
        d_optimizer=keras.optimizers.Adam(1e-3),
        g_optimizer=keras.optimizers.Adam(1e-3),
        loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    return model, {"x": IMAGES}


class Diffusion(keras.Model):
    """Predicts the noise at a random time; takes a number and a list; normalizes its inputs."""

    def __init__(self, size, widths, **kwargs):
        super().__init__(**kwargs)
        self.normalizer = layers.Normalization()
        images, times = keras.Input((size, size, 1)), keras.Input((1, 1, 1))
        x = layers.Concatenate()([images, layers.UpSampling2D(size)(times)])
        for width in widths:
            x = layers.Conv2D(width, 3, padding="same", activation="swish")(x)
        self.network = keras.Model([images, times], layers.Conv2D(1, 1)(x))
        self.seeds = keras.random.SeedGenerator(4)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.noise_metric = keras.metrics.Mean(name="noise_loss")

    @property
    def metrics(self):
        return [self.noise_metric]

    def loss_of(self, images, training):
        images = self.normalizer(images)
        times = keras.random.uniform((ops.shape(images)[0], 1, 1, 1), seed=self.seeds)
        noise = keras.random.normal(ops.shape(images), seed=self.seeds)
        noisy = ops.cos(times) * images + ops.sin(times) * noise
        return self.loss(noise, self.network([noisy, times], training=training))

    def train_step(self, images):
        with tf.GradientTape() as tape:
            loss = self.loss_of(images, training=True)
        step(self.optimizer, self.network, tape, loss)
        self.noise_metric.update_state(loss)
        return {"noise_loss": self.noise_metric.result()}


def diffusion(wrap):
    inner = Diffusion(8, widths=[3, 4])
    inner.normalizer.adapt(IMAGES)
    model = wrap(inner)
    model.compile(optimizer="adam", loss=keras.losses.MeanSquaredError())
    return model, {"x": IMAGES}


class Distances(layers.Layer):
    """Returns the squared distances of an anchor to its match and to another."""

    def call(self, anchor, match, other):
        return ops.sum((anchor - match) ** 2, -1), ops.sum((anchor - other) ** 2, -1)


class Siamese(keras.Model):
    """Takes a functional model and a margin."""

    def __init__(self, network, margin=0.5):
        super().__init__()
        self.network = network
        self.margin = margin
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.network(inputs)

    @property
    def metrics(self):
        return [self.loss_tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            near, far = self.network(data)
            loss = ops.mean(ops.maximum(near - far + self.margin, 0.0))
        step(self.optimizer, self.network, tape, loss)
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def siamese(wrap):
    embedding = keras.Sequential([keras.Input((6,)), layers.Dense(4, "relu"), layers.Dense(2)])
    inputs = [keras.Input((6,)) for _ in range(3)]
    network = keras.Model(inputs, Distances()(*map(embedding, inputs)))
    model = wrap(Siamese(network, margin=2.0))
    model.compile(optimizer="adam")
    data = tf.data.Dataset.from_tensor_slices(((VECTORS, VECTORS + 0.1, VECTORS[::-1]),))
    return model, {"x": data.map(lambda rows: rows).batch(8), "batch_size": None}


class TransformerBlock(layers.Layer):
    """Takes no `**kwargs`, and has no config."""

    def __init__(self, width, heads, rate=0.1):
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, width)
        self.feed = keras.Sequential([layers.Dense(width, activation="relu"), layers.Dense(width)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropouts = {"attention": layers.Dropout(rate), "feed": layers.Dropout(rate)}

    def call(self, inputs):
        x = self.dropouts["attention"](self.attention(inputs, inputs))
        x = self.norms[0](inputs + x)
        return self.norms[1](x + self.dropouts["feed"](self.feed(x)))


class TokenAndPosition(layers.Layer):
    """Takes no `**kwargs`, and has no config."""

    def __init__(self, length, vocabulary, width):
        super().__init__()
        self.tokens = layers.Embedding(vocabulary, width)
        self.positions = layers.Embedding(length, width)

    def call(self, inputs):
        return self.tokens(inputs) + self.positions(ops.arange(ops.shape(inputs)[-1]))


def text_classifier(wrap):
    vectorization = layers.TextVectorization(max_tokens=8, output_sequence_length=4)
    vectorization.adapt(TEXTS)
    inputs = keras.Input((), dtype="string")
    x = TokenAndPosition(4, 8, 4)(vectorization(inputs))
    x = layers.GlobalAveragePooling1D()(TransformerBlock(4, 2)(x))
    model = wrap(keras.Model(inputs, layers.Dense(3, activation="softmax")(x)))
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, {"x": tf.constant(TEXTS), "y": LABELS}


def denoising_autoencoder(wrap):
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, activation="relu", padding="same")(layers.GaussianNoise(0.3)(inputs))
    x = layers.BatchNormalization()(layers.MaxPooling2D(2)(x))
    x = layers.Conv2DTranspose(4, 3, strides=2, activation="relu", padding="same")(x)
    model = wrap(keras.Model(inputs, layers.Conv2D(1, 3, activation="sigmoid", padding="same")(x)))
    model.compile(optimizer="adam", loss="binary_crossentropy")
    return model, {"x": IMAGES, "y": IMAGES}


class Distiller(keras.Model):
    """Trains a student on the outputs of a teacher."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher

    def compile(self, optimizer, metrics, student_loss, distillation_loss, alpha, temperature):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss = student_loss
        self.distillation_loss = distillation_loss
        self.alpha = alpha
        self.temperature = temperature

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        soft = ops.softmax(self.teacher(x, training=False) / self.temperature)
        distilled = self.distillation_loss(soft, ops.softmax(y_pred / self.temperature))
        return self.alpha * self.student_loss(y, y_pred) + (1 - self.alpha) * distilled

    def call(self, x):
        return self.student(x)


def distillation(wrap):
    teacher, student = make_encoder(3), make_encoder(3)
    teacher.trainable = False
    model = wrap(Distiller(student, teacher))
    model.compile(
        optimizer=keras.optimizers.Adam(),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        student_loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss=keras.losses.KLDivergence(),
        alpha=0.1,
        temperature=10.0,
    )
    return model, {"x": IMAGES, "y": LABELS}


class ContrastiveModel(keras.Model):
    """Learns by contrast, and a linear probe beside; two optimizers, metrics made in `compile`."""

    def __init__(self, width=4, temperature=0.1):
        super().__init__()
        self.temperature = temperature
        self.augmenter = keras.Sequential([keras.Input((8, 8, 1)), layers.RandomFlip(seed=5)])
        self.encoder = make_encoder(width)
        self.projection = keras.Sequential([keras.Input((width,)), layers.Dense(width)])
        self.probe = keras.Sequential([keras.Input((width,)), layers.Dense(3)])

    def compile(self, contrastive_optimizer, probe_optimizer):
        super().compile()
        self.contrastive_optimizer = contrastive_optimizer
        self.probe_optimizer = probe_optimizer
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.accuracy = keras.metrics.SparseCategoricalAccuracy()

    @property
    def metrics(self):
        return [self.accuracy]

    def contrast(self, one, other):
        similarities = ops.matmul(ops.normalize(one), ops.transpose(ops.normalize(other)))
        labels = ops.arange(ops.shape(one)[0])
        return ops.mean(
            keras.losses.sparse_categorical_crossentropy(
                labels, similarities / self.temperature, from_logits=True
            )
        )

    def train_step(self, data):
        images, labels = data
        views = [self.augmenter(images, training=True) for _ in range(2)]
        with tf.GradientTape() as tape:
            loss = self.contrast(*(self.projection(self.encoder(view)) for view in views))
        weights = self.encoder.trainable_weights + self.projection.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.contrastive_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        with tf.GradientTape() as tape:
            outputs = self.probe(self.encoder(images))
            probe_loss = self.probe_loss(labels, outputs)
        step(self.probe_optimizer, self.probe, tape, probe_loss)
        self.accuracy.update_state(labels, outputs)
        return {"contrast": loss, "accuracy": self.accuracy.result()}


def contrastive(wrap):
    model = wrap(ContrastiveModel())
    model.compile(
        contrastive_optimizer=keras.optimizers.Adam(), probe_optimizer=keras.optimizers.Adam()
    )
    return model, {"x": IMAGES, "y": LABELS}


def lora_fine_tuning(wrap):
    inputs = keras.Input((2, 3))
    attention = layers.MultiHeadAttention(2, 3)
    x = layers.Flatten()(attention(inputs, inputs) + inputs)
    inner = keras.Model(inputs, layers.Dense(3, name="head")(x))
    for part in (attention.key_dense, attention.output_dense, inner.get_layer("head")):
        part.trainable = False
    for part in (attention.query_dense, attention.value_dense):
        part.enable_lora(2)
    model = wrap(inner)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(), loss=loss, weighted_metrics=["accuracy"])
    return model, {"x": VECTORS.reshape(-1, 2, 3), "y": LABELS}


PROGRAMS = (
    variational_autoencoder,
    wasserstein_gan,
    convolutional_gan,
    diffusion,
    siamese,
    text_classifier,
    denoising_autoencoder,
    distillation,
    contrastive,
    lora_fine_tuning,
)
