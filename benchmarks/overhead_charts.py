"""Plots of the overhead of averaging."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from polyak_model.cli.demo.experiment import COLOURS

GREY = "#999999"
PEERS = ("Keras use_ema", "host callback", "optax", "AveragedModel", "ema-pytorch")


def draw_extra_time(path, models, caption):
    """Plots the extra time of each variant relative to the bare step, a panel per model.

    Args:
        path: Path of a .png file.
        models: Dict from a model to a dict from each variant, and `floor`, to a
            tuple of the low end, the middle and the high end of its share.
        caption: String, says what was measured and what the ends are.
    """
    panels = {name: {k: v for k, v in own.items() if k != "floor"} for name, own in models.items()}
    figure, axes = _bars(panels)
    for panel, own in zip(axes, models.values(), strict=True):
        panel.axvline(own["floor"][1], color="black", linewidth=1, linestyle=":")
        panel.xaxis.set_major_formatter(PercentFormatter(1))
        panel.set_xlabel("relative to the bare step")
    title = "Extra time per training step, and the floor (dotted)"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7)
    figure.savefig(path, dpi=150)


def draw_memory(path, panels, targets):
    """Plots the memory that each variant adds, a panel per kind of memory.

    Args:
        path: Path of a .png file.
        panels: Dict from a title to a dict from a variant to a tuple of the low
            end, the middle and the high end, as multiples of the parameters'
            bytes.
        targets: Numbers, each drawn as a line.
    """
    figure, axes = _bars(panels, sharex=True)
    for panel in axes:
        for target in targets:
            panel.axvline(target, color="black", linewidth=1, linestyle=":")
        panel.set_xlabel("multiple of the parameters' bytes")
    title = "Memory beyond the bare model, and targets (dotted)"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=150)


def _bars(panels, sharex=False):
    variants = list(dict.fromkeys(name for own in panels.values() for name in own))
    size = (2.6 * len(panels) + 2.4, 0.32 * len(variants) + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=sharex, sharey=True, squeeze=False)[0]
    for panel, (title, own) in zip(axes, panels.items(), strict=True):
        for row, name in enumerate(variants):
            low, middle, high = own[name]
            colour = GREY if name in PEERS else COLOURS["average"]
            panel.barh(row, middle, color=colour, height=0.65)
            # The difference of medians can lie outside the range of single differences.
            ends = [[max(0, middle - low)], [max(0, high - middle)]]
            panel.errorbar(middle, row, xerr=ends, color="black", linewidth=1, capsize=2)
        panel.set_title(title, loc="left", fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.grid(axis="x", color="#dddddd")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(variants)), variants)
    axes[0].invert_yaxis()
    return figure, axes


def draw_growth(path, extra, lines):
    """Plots the extra time per step against the size of the model, with fitted lines.

    Args:
        path: Path of a .png file.
        extra: Dict from what grows to a dict from a size to quartiles of `extra`
            and of `floor`, in seconds.
        lines: Dict from what grows to a dict from `extra` and `floor` to slope,
            standard error and intercept.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    colours = {"extra": COLOURS["average"], "floor": GREY}
    titles = {"extra": "averaging", "floor": "the floor"}
    for panel, (way, own) in zip(figure.subplots(1, len(extra)), extra.items(), strict=True):
        sizes = np.array(list(own))
        for name, colour in colours.items():
            low, middle, high = 1e3 * np.array([q[name] for q in own.values()]).T
            slope, error, intercept = lines[way][name]
            label = f"{titles[name]}: slope {slope:.2f} ± {error:.2f}"
            panel.errorbar(
                sizes,
                middle,
                yerr=[middle - low, high - middle],
                color=colour,
                linestyle="none",
                marker="o",
                markersize=4,
                label=label,
            )
            panel.plot(sizes, 1e3 * np.exp(intercept) * sizes**slope, color=colour, linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"Growing {way}", loc="left", fontweight="bold")
        panel.set_xlabel(way)
        panel.set_ylabel("ms per step")
        panel.grid(color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
