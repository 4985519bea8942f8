"""Tables of the overhead of averaging, and what the plots show."""

import statistics

from polyak_model.cli.tables import format_table

HEADER = ["model", "variant", "extra, ms", "/ bare", "/ floor", "first call, s", "/ bare"]
HEADER += ["alone, ms", "/ floor"]
HEADER_OF_PROCESSES = ["model", "variant", "step, bare = 1", "lowest", "highest", "first call"]
HEADER_OF_PROCESSES += ["alone, floor = 1", "lowest", "highest"]


def quartiles_of_extra(times, name):
    """Returns the quartiles of the paired differences to the bare model, in seconds."""
    pairs = zip(times[name]["steps"], times["bare"]["steps"], strict=True)
    return statistics.quantiles([own - bare for own, bare in pairs], n=4)


def rows(model, times):
    """Yields the table row of each variant of a model."""
    floor, bare = (statistics.median(times[name]["steps"]) for name in ("floor", "bare"))
    bare_first = times["bare"]["first"]
    for name, own in times.items():
        first = [f"{own['first']:.2f}", f"{own['first'] / bare_first:.2f}"]
        if name in ("bare", "floor"):
            middle = statistics.median(own["steps"])
            cell = f"({1e3 * middle:.2f})"
        else:
            quartiles = quartiles_of_extra(times, name)
            middle, cell = quartiles[1], spread(quartiles)
        row = [model, name, cell, f"{middle / bare:.3f}", f"{middle / floor:.2f}", *first]
        if "alone" in own:
            quartiles = statistics.quantiles(own["alone"], n=4)
            row += [spread(quartiles), f"{quartiles[1] / floor:.2f}"]
        yield row


def spread(quartiles):
    """Returns a cell with the median, in ms, and half the interquartile range."""
    low, middle, high = quartiles
    return f"{1e3 * middle:.2f} ± {1e3 * (high - low) / 2:.2f}"


def shares(times):
    """Returns quartiles of the extra time of each variant, and the floor, per bare step."""
    bare, floor = (statistics.median(times[name]["steps"]) for name in ("bare", "floor"))
    extra = {
        name: tuple(quartile / bare for quartile in quartiles_of_extra(times, name))
        for name in times
        if name not in ("bare", "floor")
    }
    return {**extra, "floor": (floor / bare,) * 3}


def ranges(runs):
    """Returns the lowest, median and highest share of each variant over processes."""
    medians = [{name: own[1] for name, own in shares(times).items()} for times in runs]
    return {name: ends([own[name] for own in medians]) for name in medians[0]}


def ends(values):
    """Returns the lowest number, the median and the highest."""
    return min(values), statistics.median(values), max(values)


def rows_of_processes(model, runs):
    """Yields the table row of each variant of a model, relative to the bare model.

    Args:
        model: Name of the model.
        runs: List of dicts from a variant to its times, one for each process.
    """
    bare = ends([1e3 * statistics.median(run["bare"]["steps"]) for run in runs])
    yield [model, "bare", *cells_of(bare, "({:.2f} ms)")]
    for name, own in ranges(runs).items():
        if name == "floor":
            # The floor is not a training step: show its own time.
            yield [model, name, *cells_of(own, "({:.3f})")]
            continue
        first = statistics.median(run[name]["first"] / run["bare"]["first"] for run in runs)
        row = [model, name, *cells_of([1 + share for share in own], "{:.3f}"), f"{first:.2f}"]
        if "alone" in runs[0][name]:
            row += cells_of(ends([alone(run, name) for run in runs]), "{:.2f}")
        yield row


def alone(times, name):
    """Returns the median time of an update alone as a multiple of the floor."""
    return statistics.median(times[name]["alone"]) / statistics.median(times["floor"]["steps"])


def cells_of(numbers, form):
    """Formats the lowest, median and highest number, the median first."""
    low, middle, high = numbers
    return [form.format(number) for number in (middle, low, high)]


def format_rows(header, rows):
    """Formats a table without those last columns that are empty, and with empty cells."""
    width = max(map(len, rows))
    return format_table(header[:width], [row + [""] * (width - len(row)) for row in rows], left=2)
