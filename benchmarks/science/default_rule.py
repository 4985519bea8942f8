"""Which rule is never far off, whatever the training? Regret of fifteen rules.

    python benchmarks/science/default_rule.py

Claim to test: a default that does not know the length of the run should have a memory
in proportion to it. A fixed decay remembers the initial phase of a short run, and little
more than the last iterates of a long one.

In each setting of `settings.py` one training per seed keeps the averages of all rules.
The regret of a rule is its held-out score minus that of the rule that is best in this
setting, by the mean over the seeds. The differences are within a run, and their standard
errors are over the seeds. The settings are meant to be different, and short enough to run
in minutes; none was chosen by its result. The averages of the last half and quarter must
know the number of steps in advance, so they cannot be a default. BatchNormalization
statistics are averaged, not refreshed.

The score is the negative log-likelihood (NLL) per label, or per predicted number where
the loss is a squared error: `log(loss) / 2`. Under random labels see the accuracy too,
since the likelihood of true labels then partly measures under-confidence.

Source: Savage 1951, The theory of statistical decision (minimax regret).
"""

import keras
import mnist
import numpy as np
from matplotlib.figure import Figure
from settings import SETTINGS, negative_log_likelihood

from polyak_model import ExponentialAverage, PowerAverage, UniformAverage
from polyak_model.cli.tables import print_table

DECAYS = (0.9, 0.99, 0.999, 0.9999)
WIDTHS = (0.05, 0.10, 0.125, 0.15, 0.20, 0.25)
RAW = "raw"


def rules(steps):
    """Returns the rules by name, for a run of this many optimizer steps."""
    width = PowerAverage.from_relative_width
    return {
        **{f"exponential {decay}": ExponentialAverage(decay) for decay in DECAYS},
        **{f"warm-up to {d}": ExponentialAverage(d, warmup=True) for d in DECAYS[2:]},
        "uniform": UniformAverage(),
        "last half": UniformAverage(start_step=steps // 2),
        "last quarter": UniformAverage(start_step=steps - steps // 4),
        **{f"power {w:.3g}": width(w) for w in WIDTHS},
    }


NAMES = [*rules(8), RAW]


def main(arguments=None):
    parser = mnist.parser(__doc__.splitlines()[0], seeds=5, plot="default_rule.png")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    runs = mnist.with_progress(options.settings)
    scores = np.array([measure(setting, seeds, options.images) for setting in runs])
    accuracy, likelihood = np.moveaxis(scores, -1, 0)
    has_classes = ~np.isnan(accuracy[:, 0, 0])
    classified = [s for s, has in zip(options.settings, has_classes, strict=True) if has]
    regrets = {"NLL, in thousandths": (options.settings, 1000 * regret(likelihood))}
    if classified:
        regrets["accuracy, in points"] = (classified, regret(-accuracy[has_classes]))
    for title, (settings, values) in regrets.items():
        print(f"Regret in {title}: mean and standard error over {len(seeds)} seeds\n")
        print_table(["rule", *settings, "worst", "mean"], rows(values))
        print()
    draw(options.plot, regrets)
    content = {"rules": NAMES, "settings": options.settings, "seeds": list(seeds)}
    mnist.write_json(options.json, {**content, "scores": scores.tolist()})


class Averages(keras.callbacks.Callback):
    """Keeps averages of all weights by several rules, in NumPy.

    For small nets that is faster than a `PolyakModel` with as many averages, and a test
    compares the two.

    Args:
        rules: List of rules.
        steps: Int, the number of optimizer steps.

    Attributes:
        averages: Array of shape (rules, weights).
    """

    def __init__(self, rules, steps):
        super().__init__()
        self.shares = np.float32([rule.weight(np.arange(1, steps + 1)) for rule in rules])
        self.step = 0

    def on_train_begin(self, logs=None):
        self.averages = np.tile(flat(self.model), (len(self.shares), 1))

    def on_train_batch_end(self, batch, logs=None):
        move = flat(self.model) - self.averages
        move *= self.shares[:, self.step, np.newaxis]
        self.averages += move
        self.step += 1


def flat(model):
    """Returns all weights of a model as one vector."""
    return np.concatenate([np.ravel(weight) for weight in model.get_weights()])


def assign(model, vector):
    """Sets all weights of a model from one vector."""
    shapes = [weight.shape for weight in model.weights]
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
    parts = np.split(vector, ends[:-1])
    model.set_weights([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])


def measure(setting, seeds, images=None):
    """Trains once per seed and scores the averages of all rules, and the raw model.

    Args:
        setting: A name in `SETTINGS`.
        seeds: Ints.
        images: Int, number of MNIST images, or None for all.

    Returns:
        An array of shape (seeds, rules, 2): accuracy in per cent, NaN without classes,
        and negative log-likelihood. The raw model is last.
    """
    model, scores = None, []
    for seed in seeds:
        training = SETTINGS[setting](seed, images)
        # All seeds share one model, since tracing its steps takes longer than a short run.
        model = model or training.model
        if model is not training.model:
            restart(model, training.model)
        averages = Averages(rules(training.steps).values(), training.steps)
        model.fit(**training.arguments, callbacks=[averages], verbose=0)
        scores.append([])
        for weights in [*averages.averages, flat(model)]:
            assign(model, weights)
            model.reset_metrics()
            logs = model.test_on_batch(*training.held_out, return_dict=True)
            likelihood = negative_log_likelihood(logs["loss"], has_classes="accuracy" in logs)
            scores[-1].append([100 * logs.get("accuracy", np.nan), likelihood])
    return scores


def restart(model, fresh):
    """Gives a model the weights and the state of the optimizer of a fresh one."""
    model.set_weights(fresh.get_weights())
    fresh.optimizer.build(fresh.trainable_variables)
    state = {}
    fresh.optimizer.save_own_variables(state)
    model.optimizer.load_own_variables(state)


def regret(scores):
    """Returns how much worse each score is than that of the best rule of its setting.

    The best rule has the lowest mean over the seeds; the raw model, the last, is none.

    Args:
        scores: Array of shape (settings, seeds, rules), the lower the better.

    Example:

    >>> regret([[[3.0, 1.0, 0.0], [3.0, 2.0, 0.0]]]).tolist()
    [[[2.0, 0.0, -1.0], [1.0, 0.0, -2.0]]]
    """
    scores = np.asarray(scores)
    best = scores.mean(axis=1)[:, :-1].argmin(axis=1)
    return scores - np.take_along_axis(scores, best[:, None, None], axis=2)


def rows(regrets):
    """Yields the table rows, the smallest worst regret first and the raw model last.

    Args:
        regrets: Array of shape (settings, seeds, rules).
    """
    means, errors = mnist.mean_and_error(np.moveaxis(regrets, 1, 0))
    for rule in order(regrets):
        cells = [f"{m:.1f} ± {e:.1f}" for m, e in zip(means[:, rule], errors[:, rule], strict=True)]
        column = means[:, rule]
        yield [NAMES[rule], *cells, f"{column.max():.1f}", f"{column.mean():.1f}"]


def order(regrets):
    """Returns the indices of the rules by their worst mean regret; the raw model stays last."""
    worst = regrets.mean(axis=1).max(axis=0)
    return [*np.argsort(worst[:-1]), len(worst) - 1]


def draw(path, regrets):
    """Plots the mean regrets as a map of rules and settings.

    Args:
        path: Path of a .png file.
        regrets: Dict from a title to settings and an array of shape (settings, seeds,
            rules). The rules are in the order of the first.
    """
    sorted_rules = order(next(iter(regrets.values()))[1])
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    widths = [len(settings) for settings, _ in regrets.values()]
    panels = figure.subplots(1, len(regrets), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, (title, (settings, values)) in zip(panels, regrets.items(), strict=True):
        means = values.mean(axis=1)[:, sorted_rules].T
        panel.imshow(np.sqrt(np.maximum(means, 0)), cmap="YlOrRd", aspect="auto", alpha=0.8)
        for (rule, setting), mean in np.ndenumerate(means):
            panel.text(setting, rule, f"{mean:.1f}", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(settings)), settings, rotation=40, ha="right")
        panel.set_yticks(range(len(NAMES)), [NAMES[rule] for rule in sorted_rules])
        panel.set_title(f"Regret in {title}", loc="left", fontsize=10, fontweight="bold")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
