"""How the extra time of averaging scales with the size of the model.

    python benchmarks/overhead.py --growth

Claim: at most linearly. On logarithmic scales, the slope of the extra time per step
is at most 1.05, both against the number of parameters in 8 variables and against the
number of variables of 32 x 32.

The model has many weights and little computation: it uses the first row of each table
of parameters, so that the gradient is zero except for that row, and a bare step takes
a few passes over memory, as in ordinary training. The bare model, the wrapped model
and the floor of `overhead.py` alternate in shuffled order. The slope is that of a
least-squares line through the logarithms of the medians, with its standard error. The
slope of the floor itself can exceed 1, if small models fit into a cache and large
ones do not; this affects everything that reads all weights.
"""

import functools
import math
import statistics
import sys

import keras
import numpy as np
import overhead_charts
from keras import layers, ops

from polyak_model.cli.tables import format_table

WIDTH = 32
VARIABLES = 8  # While the number of parameters grows.
TARGET = 1.05


class Tables(layers.Layer):
    """Several tables of weights; a call uses the first row of each.

    Args:
        count: Int, number of tables.
        rows: Int, rows of each table.
        **kwargs: Keyword arguments of `keras.layers.Layer`.
    """

    def __init__(self, count, rows, **kwargs):
        super().__init__(**kwargs)
        self.count = count
        self.rows = rows

    def build(self, input_shape):
        shape = (self.rows, WIDTH)
        self.tables = [self.add_weight(shape=shape, initializer="ones") for _ in range(self.count)]

    def call(self, inputs):
        return inputs * sum(ops.convert_to_tensor(table)[:1] for table in self.tables)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], WIDTH)


def make_tables(count, rows):
    """Makes a model of tables only."""
    inputs = keras.Input((1,))
    return keras.Model(inputs, Tables(count, rows)(inputs))


def add_arguments(parser):
    sizes = [10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 2 * 10**8]
    parser.add_argument("--parameters", nargs="+", type=int, default=sizes, help="with --growth")
    counts = [8, 30, 100, 300, 1000, 2000]
    parser.add_argument("--variables", nargs="+", type=int, default=counts, help="with --growth")


def main(options, measure, title):
    """Times models that grow in two ways; prints a table and plots it.

    Args:
        options: Those of `overhead.py`.
        measure: `(make, batch_size, options) -> times`, that of the backend.
        title: String, says what was measured.

    Returns:
        A dict from `parameters` and `variables` to a dict from a size to the
        result of `measure`.
    """
    options.variants = ["bare", "PolyakModel"]
    shapes = {
        "parameters": {n: (VARIABLES, round(n / VARIABLES / WIDTH)) for n in options.parameters},
        "variables": {n: (n, WIDTH) for n in options.variables},
    }
    results = {way: {} for way in shapes}
    for way, own in shapes.items():
        for size, shape in own.items():
            print(f"{size:,} {way}", file=sys.stderr, flush=True)
            make = functools.partial(make_tables, *shape)
            results[way][size] = measure(make, 1, options)
            keras.utils.clear_session()
    extra = {way: {n: quartiles(times) for n, times in own.items()} for way, own in results.items()}
    print(f"{title}, ms per step\n")
    header = ["growing", "size", "bare", "floor", "extra", "extra / floor"]
    print(format_table(header, [row for way in extra for row in rows(way, extra[way])]))
    print()
    lines = {way: fit_lines(own) for way, own in extra.items()}
    cells = [[way, *slope_cells(own)] for way, own in lines.items()]
    print(format_table(["growing", "slope of extra time", "slope of floor"], cells))
    overhead_charts.draw_growth(options.plot, extra, lines)
    return results


def quartiles(times):
    """Returns quartiles of the bare step, the floor and the extra time, in seconds."""
    bare, wrapped, floor = (times[name]["steps"] for name in ("bare", "PolyakModel", "floor"))
    extra = [a - b for a, b in zip(wrapped, bare, strict=True)]
    samples = {"bare": bare, "floor": floor, "extra": extra}
    return {name: statistics.quantiles(own, n=4) for name, own in samples.items()}


def fit_lines(extra):
    """Fits lines to the logarithms of median times against sizes.

    Args:
        extra: Dict from sizes to the results of `quartiles`.

    Returns:
        A dict from `extra` and `floor` to the results of `fit_line`.
    """
    names = ("extra", "floor")
    return {name: fit_line(list(extra), [q[name][1] for q in extra.values()]) for name in names}


def fit_line(sizes, seconds):
    """Fits `log(seconds) = slope * log(size) + intercept` by least squares.

    Args:
        sizes: List of at least three numbers.
        seconds: List of as many numbers. If one is not positive, as a noisy
            difference can be, all results are NaN.

    Returns:
        Tuple of the slope, its standard error and the intercept.

    Example:

    >>> fit_line([1, 10, 100], [2.0, 20.0, 200.0])[0]
    1.0
    """
    if min(seconds) <= 0:
        return (math.nan,) * 3
    x, y = np.log(sizes), np.log(seconds)
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * y).sum() / spread
    intercept = y.mean() - slope * x.mean()
    variance = ((y - slope * x - intercept) ** 2).sum() / (len(x) - 2)
    return float(slope), math.sqrt(variance / spread), float(intercept)


def rows(way, extra):
    """Yields the table row of each size."""
    for size, own in extra.items():
        middles = {name: quartile[1] for name, quartile in own.items()}
        low, _, high = own["extra"]
        yield [
            way,
            f"{size:,}",
            *(f"{1e3 * middles[name]:.3f}" for name in ("bare", "floor")),
            f"{1e3 * middles['extra']:.3f} ± {1e3 * (high - low) / 2:.3f}",
            f"{middles['extra'] / middles['floor']:.2f}",
        ]


def slope_cells(lines):
    return [f"{slope:.3f} ± {error:.3f}" for slope, error, _ in lines.values()]
