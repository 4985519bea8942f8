"""Closed forms of averages: weighted sums of recorded iterates, in NumPy and float64."""

import numpy as np
from scipy.special import gammaln

from polyak_model import ExponentialAverage, PolynomialAverage, PowerAverage, UniformAverage

RULES = {
    "debiased": ExponentialAverage(0.9),
    "biased": ExponentialAverage(0.9, debias=False),
    "warmup": ExponentialAverage(0.9, warmup=True),
    "forgetful": ExponentialAverage(0.0),
    "uniform": UniformAverage(),
    "polynomial": PolynomialAverage(eta=3),
    "power": PowerAverage(gamma=6.94),
    "late": UniformAverage(start_step=5),
    "rare": ExponentialAverage(0.9, update_every=3),
    "late-and-rare": PowerAverage(gamma=2, start_step=4, update_every=4),
    "late-biased-rare": ExponentialAverage(0.9, debias=False, start_step=2, update_every=5),
    "rare-warmup": ExponentialAverage(0.95, warmup=True, update_every=2),
    "rare-polynomial": PolynomialAverage(eta=1, update_every=3),
}


def average(rule, start, iterates):
    """Returns the average after the last iterate, tensor by tensor.

    Args:
        rule: A `Rule`.
        start: The weights before the first step, a list of arrays.
        iterates: The weights after each step, a list of lists of arrays.
    """
    path = [[np.asarray(w, "float64") for w in weights] for weights in [start, *iterates]]
    if len(iterates) <= rule.start_step:
        return path[-1]
    begin = path[rule.start_step]
    moved = path[rule.start_step + rule.update_every :: rule.update_every]
    if not moved:
        return begin
    terms = [begin, *moved]
    weights = shares(rule, len(moved))
    return [
        sum(share * tensors[i] for share, tensors in zip(weights, terms, strict=True))
        for i in range(len(start))
    ]


def shares(rule, n):
    """Returns the shares of the initial weights and of `n` iterates that move the average."""
    i = np.arange(1, n + 1, dtype="float64")
    if isinstance(rule, UniformAverage):
        return [0.0, *np.full(n, 1 / n)]
    if isinstance(rule, PolynomialAverage):
        log = gammaln(i + rule.eta) - gammaln(i)
        return [0.0, *(np.exp(log) / np.exp(log).sum())]
    if isinstance(rule, PowerAverage):
        power = rule.gamma + 1
        return [0.0, *((i**power - (i - 1) ** power) / n**power)]
    decays = np.full(n, rule.decay)
    if rule.warmup:
        decays = np.minimum(rule.decay, i / (9 + i))
    decays = decays**rule.update_every
    kept = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    weights = (1 - decays) * kept
    if rule.debias and not rule.warmup:
        return [0.0, *(weights / weights.sum())]
    return [decays.prod(), *weights]
