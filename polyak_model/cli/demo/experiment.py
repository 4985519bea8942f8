"""The demo: one training run on real images, scored through all three routes.

Keras is imported inside the functions that need it: that takes seconds, and a
wrong argument should be told at once.
"""

import csv
import pathlib

from polyak_model.cli.demo.images import split

EPOCHS = 8
DECAY = 0.99
LEARNING_RATE = 0.02
SEED = 0
BATCH_SIZE = 32
# The logs of `fit` carry the default route's metrics under plain names.
PREFIXES = {"raw": "val_raw_", "average": "val_", "ensemble": "val_ensemble_"}
COLOURS = {"raw": "#d55e00", "average": "#0072b2", "ensemble": "#009e73"}


def build_model(image_shape, classes, learning_rate=LEARNING_RATE):
    """Builds and compiles a small convolutional net with BatchNormalization.

    Args:
        image_shape: Tuple `(height, width, channels)`.
        classes: Int, how many.
        learning_rate: Float, the constant rate of Adam.

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
        epochs: Int, how often the net sees the training images.
        decay: Float in [0, 1), of the exponential average.
        learning_rate: Float, constant.
        seed: Int, of the split, the initial weights, the order and the dropout.
        verbose: As in `keras.Model.fit`.

    Returns:
        Tuple of the trained `PolyakModel` and its history: a dict with a list
        of numbers for each metric, an entry per epoch.
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


def format_table(history):
    """Writes the last epoch's held-out loss and accuracy of each route as aligned text.

    Args:
        history: The second result of `train`.

    Example:

    >>> metrics = ["val_loss", "val_accuracy", "val_raw_loss", "val_raw_accuracy"]
    >>> metrics += ["val_ensemble_loss", "val_ensemble_accuracy"]
    >>> print(format_table({name: [0.25] for name in metrics}))
    route       loss  accuracy
    raw       0.2500    0.2500
    average   0.2500    0.2500
    ensemble  0.2500    0.2500
    """
    rows = [f"{'route':8}{'loss':>8}{'accuracy':>10}"]
    for route, prefix in PREFIXES.items():
        loss, accuracy = (history[f"{prefix}{metric}"][-1] for metric in ("loss", "accuracy"))
        rows.append(f"{route:8}{loss:8.4f}{accuracy:10.4f}")
    return "\n".join(rows)


def write_history(path, history):
    """Writes a table of all epochs and metrics as comma-separated values.

    Args:
        path: Where to.
        history: The second result of `train`.
    """
    metrics = ("loss", "accuracy")
    validation = [f"{prefix}{name}" for prefix in PREFIXES.values() for name in metrics]
    names = [*metrics, *validation]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *names])
        columns = zip(*(history[name] for name in names), strict=True)
        for epoch, row in enumerate(columns, start=1):
            # The metrics are float32, which holds seven digits.
            writer.writerow([epoch, *(f"{value:.7g}" for value in row)])


def draw_history(path, history):
    """Draws the held-out loss and accuracy of each route over the epochs.

    Args:
        path: Where to, a .png file.
        history: The second result of `train`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, metric in zip(panels, ("loss", "accuracy"), strict=True):
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


def save_results(folder, model, history):
    """Writes the average model, the history and its picture into an existing folder.

    Args:
        folder: A path.
        model: The first result of `train`.
        history: The second.

    Returns:
        List of the paths written.
    """
    names = ("average.keras", "history.csv", "history.png")
    written = [pathlib.Path(folder) / name for name in names]
    model.average_model.save(written[0])
    write_history(written[1], history)
    draw_history(written[2], history)
    return written
