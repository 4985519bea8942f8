"""A small diffusion model of 8x8 digits: its net, training pairs, sampler, and a distance.

The net is trained to denoise digits at random noise levels, with the preconditioning,
the levels and the sampler of the source. Everything around the net is NumPy.

Source: Karras et al. 2022, Elucidating the design space of diffusion-based generative
models, table 1 and algorithm 1.
"""

import itertools

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

PIXELS = 64
BATCH_SIZE = 32
_LEVEL_MEAN, _LEVEL_SPREAD = -1.2, 1.2  # Of the logarithm of the noise level in training.
_LOWEST, _HIGHEST, _CURVE = 0.002, 80.0, 7  # Of the noise levels of the sampler.


def load(seed):
    """Returns 1,438 training digits and 359 held-out ones.

    They are float32 arrays of shape (n, 64) with a mean of 0 and a standard deviation
    of 0.5 over all pixels.
    """
    x = load_digits().data
    x = np.float32((x - x.mean()) / x.std() / 2)
    order = np.random.default_rng(seed).permutation(len(x))
    held_out, training = np.split(order, [len(x) // 5])
    return x[training], x[held_out]


def build_model(rate, seed, units=128):
    """Seeds Keras, then builds and compiles a dense net that denoises digits."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    digits = keras.Input((PIXELS,))
    level = keras.Input((1,))
    waves = layers.Dense(32, trainable=False, kernel_initializer="random_normal")(
        layers.Rescaling(30.0)(level)
    )
    x = layers.Concatenate()([digits, keras.ops.sin(waves), keras.ops.cos(waves)])
    for _ in range(3):
        x = layers.Dense(units, activation="silu")(x)
    model = keras.Model([digits, level], layers.Dense(PIXELS)(x))
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    return model


def scales(level):
    """Returns the factors of the digits, the net and its input at each noise level."""
    total = np.sqrt(level**2 + 0.25)
    return 0.25 / total**2, 0.5 * level / total, 1 / total


def pairs(digits, generator):
    """Adds noise to digits; returns the inputs of the net and what it should answer."""
    exponent = np.float32(generator.normal(_LEVEL_MEAN, _LEVEL_SPREAD, (len(digits), 1)))
    level = np.exp(exponent)
    noisy = digits + level * generator.standard_normal(digits.shape, "float32")
    skip, out, scale = scales(level)
    return (scale * noisy, exponent / 4), (digits - skip * noisy) / out


def training_pairs(digits, steps, seed):
    """Returns `(inputs, targets)` for so many steps of `fit`, with a draw of noise for each."""
    generator = np.random.default_rng([seed, 2])
    drawn = generator.integers(len(digits), size=steps * BATCH_SIZE)
    return pairs(digits[drawn], generator)


def held_out_pairs(digits, copies=10):
    """Returns `(inputs, targets)` for `evaluate`: each digit with several draws of noise."""
    return pairs(np.tile(digits, (copies, 1)), np.random.default_rng(0))


def sample(model, count, seed, steps=18):
    """Draws digits from a model by Heun's method.

    Args:
        model: A Keras model as `build_model` returns it.
        count: Int, the number of digits.
        seed: Int, the seed of the initial noise.
        steps: Int, the number of noise levels. Defaults to 18.

    Returns:
        An array of shape `(count, 64)`.
    """
    ends = _HIGHEST ** (1 / _CURVE), _LOWEST ** (1 / _CURVE)
    levels = np.append(np.linspace(*ends, steps) ** _CURVE, 0)
    x = levels[0] * np.random.default_rng(seed).normal(size=(count, PIXELS))
    for level, following in itertools.pairwise(levels):
        slope = _slope(model, x, level)
        step = x + (following - level) * slope
        if following > 0:
            slope = (slope + _slope(model, step, following)) / 2
        x = x + (following - level) * slope
    return x


def _slope(model, x, level):
    skip, out, scale = scales(level)
    exponents = np.full((len(x), 1), np.log(level) / 4, "float32")
    answer = np.float64(model.predict_on_batch([np.float32(scale * x), exponents]))
    return (x - (skip * x + out * answer)) / level


def sliced_distance(x, y, directions=500):
    """Returns the sliced Wasserstein distance of two sets of points of any sizes.

    It is the root of the mean over random directions of the squared distance of the
    projected distributions, from 1,000 quantiles of each.
    """
    unit = np.random.default_rng(0).normal(size=(x.shape[1], directions))
    unit /= np.linalg.norm(unit, axis=0)
    levels = (np.arange(1_000) + 0.5) / 1_000
    one, other = (
        np.sort(points @ unit, axis=0)[(levels * len(points)).astype(int)] for points in (x, y)
    )
    return float(np.sqrt(np.mean((one - other) ** 2)))
