"""The plot of `polyak-model sweep`: score and error against the length of the average."""

import itertools

from matplotlib.figure import Figure

from polyak_model.posthoc.reach import family_of


def draw(result, metric, path):
    """Draws the scores of a sweep with their standard errors, and the walk errors below.

    Args:
        result: A `polyak_model.snapshots.sweeping.Sweep`.
        metric: Name of the score.
        path: Where to write.
    """

    def group(row):
        return family_of(row.rule, row.step).label, row.step

    rows = sorted((row for row in result.rows if row.score is not None), key=group)
    labels = sorted({group(row)[0] for row in rows})
    figure = Figure(figsize=(5 * len(labels), 5), layout="constrained")
    axes = figure.subplots(2, len(labels), sharex="col", squeeze=False, height_ratios=[2, 1])
    for (label, step), members in itertools.groupby(rows, group):
        upper, lower = axes[:, labels.index(label)]
        members = sorted(members, key=lambda row: family_of(row.rule, row.step).length)
        lengths = [family_of(row.rule, row.step).length for row in members]
        scores = [row.score for row in members]
        errors = [row.standard_error or 0 for row in members]
        upper.errorbar(lengths, scores, errors, marker="o", capsize=3, label=f"step {step:,}")
        lower.plot(lengths, [row.walk_error for row in members], marker=".")
        upper.set(ylabel=metric, xscale="log")
        lower.set(xlabel=label, ylabel="walk error")
        upper.legend()
    figure.savefig(path)
