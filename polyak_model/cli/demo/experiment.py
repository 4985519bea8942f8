"""The demo: one training run on real images, scored through all three routes.

Keras is imported inside the functions that need it. That takes seconds, and a
wrong argument should be reported at once.
"""

import csv
import pathlib

from polyak_model.cli.demo.images import split

EPOCHS = 8
DECAY = 0.99
LEARNING_RATE = 0.02
SEED = 0
BATCH_SIZE = 32
HEADER = ["route", "loss", "accuracy"]
# The logs of `fit` carry the default route's metrics under plain names.
PREFIXES = {"raw": "val_raw_", "average": "val_", "ensemble": "val_ensemble_"}
COLOURS = {"raw": "#d55e00", "average": "#0072b2", "ensemble": "#009e73"}


def build_model(image_shape, classes, learning_rate=LEARNING_RATE):
    """Builds and compiles a small convolutional net with BatchNormalization.

    Args:
        image_shape: Tuple `(height, width, channels)`.
        classes: Int, the number of classes.
        learning_rate: Float, the constant learning rate of Adam.

    Returns:
        A compiled `keras.Sequential`.

    Example:

    >>> build_model((28, 28, 1), classes=10).output_shape
    (None, 10)
    """
    import keras
    from keras import layers

    model = keras.Sequential([keras.Input(image_shape)], name="raw")
    for filters in (16, 32, 32):
        model.add(layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.add(layers.Flatten())
    model.add(layers.Dropout(0.5))
    model.add(layers.Dense(classes, activation="softmax"))
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def train(
    x, y, *, epochs=EPOCHS, decay=DECAY, learning_rate=LEARNING_RATE, seed=SEED, verbose="auto"
):
    """Trains a net and scores it on held-out images after each epoch, all routes in one pass.

    Args:
        x: Images, shape (n, height, width, channels).
        y: Integer labels, numbered from 0.
        epochs: Int, the number of passes over the training images.
        decay: Float in [0, 1), the decay of the exponential average.
        learning_rate: Float, the constant learning rate of Adam.
        seed: Int, the seed of the split, the initial weights, the order and the
            dropout.
        verbose: As in `keras.Model.fit`.

    Returns:
        Tuple of the trained `PolyakModel` and its history: a dict from the name
        of each metric to a list with one float per epoch.
    """
    import keras

    from polyak_model.model import PolyakModel

    keras.utils.set_random_seed(seed)
    training, held_out = split(x, y, seed)
    inner = build_model(x.shape[1:], int(y.max()) + 1, learning_rate)
    model = PolyakModel(inner, average=decay, report=("average", "raw", "ensemble"))
    history = model.fit(
        *training,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=held_out,
        verbose=verbose,
    )
    return model, history.history


def table_rows(history):
    """Returns the held-out loss and accuracy of each route after the last epoch.

    Args:
        history: The second result of `train`.

    Returns:
        A list of rows of strings, in the columns `HEADER`.

    Example:

    >>> metrics = ["val_loss", "val_accuracy", "val_raw_loss", "val_raw_accuracy"]
    >>> metrics += ["val_ensemble_loss", "val_ensemble_accuracy"]
    >>> table_rows({name: [0.5, 0.25] for name in metrics})[0]
    ['raw', '0.2500', '0.2500']
    """
    return [
        [route, *(f"{history[prefix + metric][-1]:.4f}" for metric in HEADER[1:])]
        for route, prefix in PREFIXES.items()
    ]


def write_history(path, history):
    """Writes all metrics of all epochs as comma-separated values.

    Args:
        path: Path of the file to write.
        history: The second result of `train`.
    """
    prefixes = ("", *PREFIXES.values())
    names = [f"{prefix}{metric}" for prefix in prefixes for metric in HEADER[1:]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *names])
        columns = zip(*(history[name] for name in names), strict=True)
        for epoch, row in enumerate(columns, start=1):
            # The metrics are float32, which has seven digits.
            writer.writerow([epoch, *(f"{value:.7g}" for value in row)])


def draw_history(path, history, setting):
    """Plots the held-out loss and accuracy of each route over the epochs.

    Args:
        path: Path of the .png file to write.
        history: The second result of `train`.
        setting: A string, the title: the rule and the seed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(setting)
    panels = figure.subplots(1, 2)
    for panel, metric in zip(panels, HEADER[1:], strict=True):
        for route, prefix in PREFIXES.items():
            values = history[f"{prefix}{metric}"]
            epochs = range(1, len(values) + 1)
            panel.plot(epochs, values, color=COLOURS[route], label=route, marker="o", markersize=4)
        panel.set_title(f"Held-out {metric}", loc="left", fontweight="bold")
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(axis="y", color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def save_results(folder, model, history, setting):
    """Saves the average model, the history and its plot in an existing folder.

    Args:
        folder: Its path.
        model: The first result of `train`.
        history: The second result of `train`.
        setting: A string, the title of the plot.

    Returns:
        List of the paths of the files written.
    """
    names = ("average.keras", "history.csv", "history.png")
    written = [pathlib.Path(folder) / name for name in names]
    model.average_model.save(written[0])
    write_history(written[1], history)
    draw_history(written[2], history, setting)
    return written
