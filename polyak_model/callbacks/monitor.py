"""Measures during training what the averages do."""

import math
import os
import typing

import keras
import numpy as np
import rich.table
from keras import ops

from polyak_model import backend
from polyak_model.callbacks.histograms import HistogramWriter
from polyak_model.errors import check_choice, check_integer
from polyak_model.model import PolyakModel

if typing.TYPE_CHECKING:
    import matplotlib.figure

_MOST_TICKS = 10


class AverageMonitor(keras.callbacks.Callback):
    """Adds to the logs how far each average is from the raw model, and what it remembers.

    For an average of the name `average` (that of a single one) these are

    - `average_distance`: norm(raw - average) / norm(raw),
    - `average_moved`: norm(average - average before) / norm(raw),
    - `average_effective_iterates` and `average_mean_age`, see
      `Rule.effective_iterates` and `Rule.mean_age`,

    and once for all averages `raw_moved`, norm(raw - raw before) / norm(raw),
    where "before" is the measurement before, at first the beginning of training;
    NaN for a model that had no weights then.
    Norms are Euclidean norms of all float weights together.

    Keras passes the logs to one callback after the other: put this one before
    those that read the logs, such as `CSVLogger` and `TensorBoard`. `History`
    always comes last. A copy of the raw weights and of each average is kept in
    the memory of the host.

    Args:
        every: `"epoch"`, or an int of at least 1, the number of batches between
            two measurements. The logs of an epoch then have the last one.
            Defaults to `"epoch"`.
        per_layer: Bool. Whether to measure each layer too, for `table()` and
            `plot()`. Defaults to False.
        histograms: A folder in which to write, at each measurement, histograms
            of the weights of each average and of their differences from the raw
            weights, for TensorBoard. Defaults to None.

    Attributes:
        history: A dict from `"step"` and each name in the logs to a list with an
            item for each measurement.
        layers: A dict from the path of each layer to such a dict; empty unless
            `per_layer`.

    Raises:
        ValueError: If `every` is out of its range.
        ImportError: If there are to be histograms and TensorBoard is not
            installed.
        TypeError: When training begins, if the model is not a `PolyakModel`.

    Example:

    >>> model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), 0.9)
    >>> model.compile(optimizer="sgd", loss="mse")
    >>> monitor = AverageMonitor()
    >>> x, y = np.ones((8, 3)), np.ones((8, 1))
    >>> history = model.fit(x, y, epochs=3, batch_size=4, callbacks=[monitor], verbose=0).history
    >>> monitor.history["step"], [round(age, 2) for age in history["average_mean_age"]]
    ([2, 4, 6], [0.47, 1.37, 2.19])
    >>> history["average_distance"] == monitor.history["average_distance"]
    True
    """

    def __init__(
        self,
        every: int | str = "epoch",
        per_layer: bool = False,
        histograms: str | os.PathLike | None = None,
    ) -> None:
        super().__init__()
        if every != "epoch":
            every = check_integer("every", every, at_least=1, counts="batches, if not 'epoch'")
        self.every = every
        self.per_layer = bool(per_layer)
        self.history: dict[str, list] = {}
        self.layers: dict[str, dict[str, list]] = {}
        # Otherwise Keras would wait for the logs of each batch.
        self.async_safe = every == "epoch"
        self._writer = None if histograms is None else HistogramWriter(histograms)
        self._before: dict[str, list[np.ndarray]] = {}
        self._newest: dict[str, float] = {}
        self._unmeasured = 0
        self._last_batch = -1

    def on_train_begin(self, logs=None):
        if not isinstance(self.model, PolyakModel):
            raise TypeError(
                "AverageMonitor measures the averages of a PolyakModel. Received: the fit of a "
                f"{type(self.model).__name__}. Wrap the model: PolyakModel(model)."
            )
        self._before, self._newest, self._unmeasured = {}, {}, 0

    def on_epoch_begin(self, epoch, logs=None):
        self._last_batch = -1
        if not self._before:
            # Not in on_train_begin, where BackupAndRestore may still have to load its backup.
            self._before = _read(self.model)

    def on_train_batch_end(self, batch, logs=None):
        if self.every == "epoch":
            return
        # With steps_per_execution, one call stands for several batches.
        self._unmeasured += batch - self._last_batch
        self._last_batch = batch
        if self._unmeasured >= self.every:
            self._unmeasured = 0
            self._measure()
            if logs is not None:
                logs.update(self._newest)

    def on_epoch_end(self, epoch, logs=None):
        if self.every == "epoch" or not self._newest:
            self._measure()
        if logs is not None:
            logs.update(self._newest)

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.flush()

    def table(self) -> rich.table.Table:
        """Returns the last measurement of each layer as a `rich.table.Table`.

        Raises:
            ValueError: If layers were not measured.

        Example:

        >>> model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> monitor = AverageMonitor(per_layer=True)
        >>> _ = model.fit(np.ones((4, 3)), np.ones((4, 1)), callbacks=[monitor], verbose=0)
        >>> [column.header for column in monitor.table().columns]
        ['layer', 'raw_moved', 'average_distance', 'average_moved']
        """
        self._check_measured("table")
        names = list(next(iter(self.layers.values())))[1:]
        table = rich.table.Table("layer", box=None, pad_edge=False)
        for name in names:
            table.add_column(name, justify="right")
        for layer, history in self.layers.items():
            table.add_row(layer, *(f"{history[name][-1]:.3g}" for name in names))
        return table

    def plot(self, name: str | None = None) -> "matplotlib.figure.Figure":
        """Draws a quantity as a heat map, layers by measurements.

        Args:
            name: The quantity, such as `"average_distance"`, `"average_moved"`
                or `"raw_moved"`. Defaults to None: the distance of the first average.

        Returns:
            A `matplotlib.figure.Figure`, which notebooks show.

        Raises:
            ValueError: If layers were not measured, or there is no such quantity.

        Example:

        >>> model = PolyakModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> monitor = AverageMonitor(per_layer=True)
        >>> _ = model.fit(np.ones((4, 3)), np.ones((4, 1)), callbacks=[monitor], verbose=0)
        >>> monitor.plot("raw_moved").axes[0].get_xlabel()
        'step'
        """
        from matplotlib.figure import Figure  # It takes half a second, and no training needs it.

        self._check_measured("plot")
        histories = list(self.layers.values())
        names = list(histories[0])[1:]
        name = next(each for each in names if each.endswith("_distance")) if name is None else name
        check_choice("name", name, names)
        figure = Figure(figsize=(8, 1.5 + 0.25 * len(histories)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow([each[name] for each in histories], aspect="auto", cmap="viridis")
        steps = histories[0]["step"]
        labelled = range(0, len(steps), -(-len(steps) // _MOST_TICKS))
        axes.set_xticks(labelled, [str(steps[i]) for i in labelled])
        axes.set_yticks(range(len(histories)), self.layers)
        axes.set_xlabel("step")
        figure.colorbar(image, label=name)
        return figure

    def _check_measured(self, method):
        if not self.layers:
            raise ValueError(
                f"`{method}()` needs measurements of layers. Received: "
                f"per_layer={self.per_layer} and {len(self.history.get('step', ()))} "
                "measurements. Pass AverageMonitor(per_layer=True) to fit first."
            )

    def _measure(self):
        backend.sync(self.model)
        step = self.model.average_step
        weights = _read(self.model)
        everything = range(len(weights["raw"]))
        self._newest = _compare(weights, self._before, everything)
        for name, average in self.model.shadow.averages.items():
            t = step - int(ops.convert_to_numpy(average.origin))
            self._newest[f"{name}_effective_iterates"] = average.rule.effective_iterates(t)
            self._newest[f"{name}_mean_age"] = average.rule.mean_age(t)
        _append(self.history, {"step": step, **self._newest})
        for layer, indices in _group_by_layer(self.model).items() if self.per_layer else ():
            row = {"step": step, **_compare(weights, self._before, indices)}
            _append(self.layers.setdefault(layer, {}), row)
        if self._writer is not None and backend.is_writer(self.model):
            self._writer.write(_tag(weights, self.model), step)
        self._before = weights


def _append(history, row):
    for name, value in row.items():
        history.setdefault(name, []).append(value)


def _float_weights(model):
    return [w for w in model.weights if keras.backend.is_float_dtype(w.dtype)]


def _group_by_layer(model):
    """Returns the indices of the float weights of each layer, by the path of the layer."""
    layers = {}
    for index, weight in enumerate(_float_weights(model.raw_model)):
        layers.setdefault(weight.path.rpartition("/")[0], []).append(index)
    return layers


def _read(model):
    """Copies the float weights of the raw model and of each average, by name."""
    models = {"raw": model.raw_model, **model.average_models}
    return {name: [_copy(w) for w in _float_weights(each)] for name, each in models.items()}


def _tag(weights, model):
    """Returns the weights of averages and their differences from the raw weights, by tag."""
    paths = [weight.path for weight in _float_weights(model.raw_model)]
    arrays = {}
    for name in list(weights)[1:]:
        for path, array, raw in zip(paths, weights[name], weights["raw"], strict=True):
            arrays[f"{name}/{path}"] = array
            with np.errstate(invalid="ignore"):
                arrays[f"{name} - raw/{path}"] = array - raw
    return arrays


def _copy(variable):
    array = backend.fetch(variable)
    # Norms in 16 bits would overflow.
    return np.array(array, dtype=np.promote_types(array.dtype, np.float32))


@np.errstate(invalid="ignore", over="ignore")  # A training that diverges is measured as NaN.
def _compare(weights, before, indices):
    """Returns distances between averages and models, relative to the norm of the raw weights."""

    def distance(ones, others):
        if not others:
            return math.nan
        difference = _norm(ones[i] - others[i] for i in indices)
        if norm == 0:
            return math.inf if difference else 0.0
        return difference / norm

    raw = weights["raw"]
    norm = _norm(raw[i] for i in indices)
    result = {"raw_moved": distance(raw, before["raw"])}
    for name in list(weights)[1:]:
        result[f"{name}_distance"] = distance(weights[name], raw)
        result[f"{name}_moved"] = distance(weights[name], before[name])
    return result


def _norm(arrays):
    return math.hypot(*(float(np.linalg.norm(array)) for array in arrays))
