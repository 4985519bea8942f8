"""Models with training steps of their own, as people write them."""

import keras
import tensorflow as tf
from keras import layers, ops


class Autoencoder(keras.Model):
    """A variational autoencoder with trackers of its losses."""

    def __init__(self, width=2, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.encoder = layers.Dense(2 * width)
        self.decoder = layers.Dense(6)
        self.noise = keras.random.SeedGenerator(1)
        self.total_tracker = keras.metrics.Mean(name="total")
        self.divergence_tracker = keras.metrics.Mean(name="divergence")

    @property
    def metrics(self):
        return [self.total_tracker, self.divergence_tracker]

    def call(self, inputs):
        mean, _ = ops.split(self.encoder(inputs), 2, axis=-1)
        return self.decoder(mean)

    def losses_of(self, x):
        mean, log_variance = ops.split(self.encoder(x), 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.noise)
        z = mean + ops.exp(0.5 * log_variance) * noise
        divergence = -0.5 * ops.mean(1 + log_variance - mean**2 - ops.exp(log_variance))
        return ops.mean((self.decoder(z) - x) ** 2) + divergence, divergence

    def track(self, total, divergence):
        self.total_tracker.update_state(total)
        self.divergence_tracker.update_state(divergence)
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            total, divergence = self.losses_of(x)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(total, weights), weights, strict=True))
        return self.track(total, divergence)

    def test_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self.track(*self.losses_of(x))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class Adversaries(keras.Model):
    """A generative adversarial net: two optimizers, and a `compile` of its own."""

    def __init__(self, width=2, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.generator = keras.Sequential([keras.Input((width,)), layers.Dense(6)])
        self.critic = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
        self.noise = keras.random.SeedGenerator(1)
        self.generator_tracker = keras.metrics.Mean(name="generator_loss")

    def compile(self, generator_optimizer, critic_optimizer, loss_function):
        super().compile()
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer
        self.loss_function = loss_function

    @property
    def metrics(self):
        return [self.generator_tracker]

    def call(self, z):
        return self.generator(z)

    def imagine(self, count):
        return self.generator(keras.random.normal((count, self.width), seed=self.noise))

    def train_step(self, real):
        count = ops.shape(real)[0]
        with tf.GradientTape() as tape:
            loss = self.loss_function(ops.ones((count, 1)), self.critic(real))
            loss += self.loss_function(ops.zeros((count, 1)), self.critic(self.imagine(count)))
        weights = self.critic.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.critic_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        with tf.GradientTape() as tape:
            loss = self.loss_function(ops.ones((count, 1)), self.critic(self.imagine(count)))
        weights = self.generator.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.generator_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.generator_tracker.update_state(loss)
        return {"generator_loss": self.generator_tracker.result()}

    def test_step(self, real):
        count = ops.shape(real)[0]
        loss = self.loss_function(ops.ones((count, 1)), self.critic(self.imagine(count)))
        self.generator_tracker.update_state(loss)
        return {"generator_loss": self.generator_tracker.result()}

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class Denoiser(keras.Model):
    """A denoising diffusion model: a net that predicts the noise at a random time."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = keras.Sequential([layers.Dense(8, activation="swish"), layers.Dense(6)])
        self.noise = keras.random.SeedGenerator(1)

    def call(self, inputs):
        return self.net(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        count = ops.shape(x)[0]
        time = keras.random.uniform((count, 1), seed=self.noise)
        noise = keras.random.normal(ops.shape(x), seed=self.noise)
        noisy = ops.cos(time) * x + ops.sin(time) * noise
        return ops.mean((self(ops.concatenate([noisy, time], axis=-1)) - noise) ** 2)

    def train_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"noise_loss": loss}

    def test_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return {"noise_loss": self.compute_loss(x=x)}
