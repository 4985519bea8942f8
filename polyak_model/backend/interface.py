"""What a backend provides, documented once.

`polyak_model.backend.<name>` is the implementation for the current backend of Keras. Each
backend has a folder, with one file for each key of `MODULES` and in it the functions and classes
listed there, under the signatures below. A folder may hold further files for itself.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import keras

MODULES = {
    "update": ("assign", "update"),
    "fingerprint": ("fingerprint",),
    "trainer": (
        "BuildHook",
        "EvaluationStep",
        "PredictionStep",
        "Trainer",
        "TrainingStep",
        "build_by_step",
        "call_step",
        "exclusive_call",
        "interruptible",
        "may_skip_steps",
        "optimizer_step",
        "rehearse",
        "score",
        "sync",
    ),
    "tracing": (
        "compiled",
        "double_precision",
        "is_differentiated",
        "keeps_updates",
        "lift",
        "outside_trace",
        "runs_eagerly",
        "scalar",
        "symbolic",
        "traces_for_export",
        "variables_are_current",
        "when",
    ),
    "placement": (
        "device",
        "on_each_replica",
        "once",
        "place_like",
        "replicas",
        "strategy_scope",
        "synchronize",
    ),
    "processes": ("fetch", "in_one_process", "is_writer"),
    "copying": ("copy_rules", "is_bookkeeping", "is_shared", "track_copies"),
    "generators": ("unchanged_generators",),
    "checks": ("check_compilation", "check_method", "check_placement"),
}

Tensor = Any
Nested = Any


class Pair(Protocol):
    """An average and the weight that it averages, variables of equal shape."""

    target: keras.Variable
    """What is updated: the average, or its float32 master copy."""
    raw: keras.Variable | Tensor
    """The iterate."""
    residual: keras.Variable | None
    """The rounding error carried along by compensation."""


# update.py: averages, and copies.


def update(updates: Sequence[tuple[Sequence[Pair], Tensor]]) -> None:
    """Updates averages of one model in place.

        target += weight * (raw - target)

    A weight of 1 copies the iterate and a weight of 0 leaves the average, bit
    for bit; so does an iterate that equals the average. Where the iterate is
    inf or NaN, the average stays. It is finite wherever the iterate is, also
    where `raw - target` overflows.

    Where `residual` is not None, it carries the rounding error along, and
    `target + residual` is the average to twice the precision.

    Args:
        updates: For each average its pairs and the weight, a scalar float64
            tensor in [0, 1]. The pairs of all averages have the same raw
            weights, in the same order, each of which is read once for all.

    Reference:
        Kahan 1965, Further remarks on reducing truncation errors.
    """


def assign(
    pairs: Iterable[tuple[keras.Variable, keras.Variable | Tensor]], weight: Tensor | float = 1.0
) -> None:
    """Copies values: `target = source` where `weight` is above 0.

    Args:
        pairs: `(target, source)` of equal shape; the source is cast.
        weight: Scalar, 0 to change nothing. Defaults to 1.
    """


# fingerprint.py: whether weights have changed.


def fingerprint(variables: Iterable[keras.Variable]) -> Tensor:
    """Returns a hash of the values of variables, a scalar integer tensor other than 0.

    It is computed from 0, for one variable after another, by

        hash = hash * m + sum(mix(bits[i]) * (mix((i + 1) * m) | 1))

    where m = 0x9E3779B1 and mix(x) = x ^ (x >> 16), with arithmetic of unsigned
    integers modulo 2**32, and `bits` are the values as such integers: values of
    16 bits are zero-extended, those of 64 bits are two each, the lower half
    first. The result is that hash as a signed integer of 32 bits, 1 in place of
    0. It is the same on all backends.

    A change of one value of at most 32 bits always changes it. Other changes
    cancel with a probability of about 2**-32.

    Args:
        variables: Float variables.
    """


# trainer.py: the steps that Keras compiles, and what they need.


class TrainingStep:
    """Mixin that makes Keras train by `_train_batch(data)`, which returns the logs.

    Put it before `keras.Model` among the bases. `_train_batch` may assign to
    variables, whatever signature the `train_step` of this backend has. A class
    that does not inherit from it keeps Keras's `train_step`. The subclass also
    implements `_moved_pairs()`, which returns lists of the pairs that a step
    moves by one weight; JAX keeps small ones together.
    """


class EvaluationStep:
    """Mixin that makes Keras evaluate by `_test_batch(data)`, which returns the logs."""


class PredictionStep:
    """Mixin that makes Keras predict by `_predict_batch(data)`, which returns the outputs."""


class BuildHook:
    """Mixin: before the first step Keras calls `_build_on_batch(data)`.

    That method creates all variables for a batch, or for None where they all
    exist. The subclass also implements `_scored()`, which returns the models
    whose metrics are updated, and `_may_build_before_tracing()`, which returns
    whether `_build_on_batch` may be called before a step is traced, though Keras
    itself would not, with the types of a batch.
    """


class Trainer(TrainingStep, EvaluationStep, PredictionStep, BuildHook):
    """All three steps, and what Keras does before the first of them.

    The subclass also implements `_check_compiled(method_name)`, which raises
    `ValueError` unless the model can run the method.
    """


def call_step(model: keras.Model, name: str, data: Nested) -> Nested:
    """Calls a step of another model inside a step of ours.

    Args:
        model: A compiled model.
        name: `"train_step"`, `"test_step"` or `"predict_step"`.
        data: The batch.

    Returns:
        The logs, or the outputs of `predict_step`.
    """


def optimizer_step(model: keras.Model) -> Tensor:
    """Returns the number of steps that the optimizers of a model have taken, an integer tensor.

    Under gradient accumulation and loss scaling it advances when the weights
    do, not at every batch. The steps of several optimizers are summed.

    Args:
        model: A compiled model.
    """


def may_skip_steps(model: keras.Model) -> bool:
    """Returns whether a batch may leave the weights unchanged: accumulation, loss scaling.

    Args:
        model: A compiled model.
    """


def score(
    model: keras.Model, x: Nested, y: Nested, sample_weight: Nested, outputs: Nested
) -> dict[str, Tensor]:
    """Updates the loss and the metrics of a model from given outputs, and returns the logs.

    It is `test_step` of Keras without the forward pass.

    Args:
        model: A compiled model.
        x: Inputs of the batch.
        y: Targets of the batch.
        sample_weight: Sample weights of the batch, or None.
        outputs: The outputs to score.
    """


def build_by_step(model: keras.Model, batch: Nested) -> None:
    """Creates the weights of a model as its first training step does, and takes no step.

    Args:
        model: A compiled `keras.Model` that has no `call`.
        batch: What its `train_step` takes: tensors, arrays and None.
    """


def rehearse(
    function: Callable[[Nested], Any], batch: Nested, variables: Iterable[keras.Variable]
) -> None:
    """Traces a function and drops the trace: it creates its variables and changes none.

    Args:
        function: What to trace.
        batch: Its argument: tensors, arrays and None.
        variables: The existing variables that it reads.
    """


def exclusive_call(
    model: keras.Model, route: keras.Model | None
) -> contextlib.AbstractContextManager:
    """Returns a context for a call of `fit`, `evaluate`, `predict` or `save`.

    Where such a call takes the values out of the variables, the other threads
    wait for it, and the values are back if it fails.

    Args:
        model: The model that is trained.
        route: The model whose method is called, which shares variables with it;
            or None for a call that only reads them.
    """


def interruptible(model: keras.Model, callbacks: Nested) -> Nested:
    """Returns callbacks of `fit` during which other threads may use the model.

    A callback may wait for such a thread, except between the batches of a
    validation.

    Args:
        model: The model that is trained.
        callbacks: The argument `callbacks` of `fit`.
    """


def sync(model: keras.Model) -> None:
    """Writes state that a training loop keeps elsewhere back to the variables of a model.

    Call it before variables are read or written outside of a step.

    Args:
        model: The model that is trained.
    """


# tracing.py: eager execution and graphs.


def when(condition: Tensor | bool, function: Callable[[], Any]) -> None:
    """Calls a function if a condition holds, also where the condition is traced.

    Args:
        condition: Bool or scalar boolean tensor.
        function: Its result is dropped.
    """


def compiled(function: Callable) -> Callable:
    """Returns a function that is compiled as a whole by the compiler of the backend."""


def double_precision() -> contextlib.AbstractContextManager:
    """Returns a context in which tensors of dtype `float64` have 64 bits."""


def scalar(value: keras.Variable | Tensor | bool | int) -> Tensor | bool | int:
    """Returns a scalar for arithmetic: a number of Python's where tensors are slower, else itself.

    Args:
        value: An integer or boolean, as a scalar variable, a tensor or a number.
    """


def runs_eagerly() -> bool:
    """Returns whether operations are executed now rather than traced."""


def variables_are_current() -> bool:
    """Returns whether variables hold the current state, and not a step that is a function of it."""


def is_differentiated(variables: Iterable[keras.Variable]) -> bool:
    """Returns whether the gradient of some variable is being computed, False if unknown.

    On JAX Keras does not tell the parts of a subclassed model that it is trained;
    elsewhere nobody needs to ask.

    Args:
        variables: The variables.
    """


def keeps_updates() -> bool:
    """Returns whether assignments last; they do not while Keras only infers shapes."""


def traces_for_export() -> bool:
    """Returns whether operations are traced into a graph that is saved and served elsewhere."""


def lift() -> contextlib.AbstractContextManager:
    """Returns a context that executes operations now, even inside a trace."""


def outside_trace(function: Callable[[], Any]) -> None:
    """Calls a function now, without the current trace recording which variables it uses.

    Args:
        function: Its result is dropped.
    """


def symbolic(inputs: Nested) -> Nested:
    """Returns a `keras.KerasTensor` for each tensor or array of a batch, None for None.

    Args:
        inputs: A nested structure.
    """


# placement.py: devices and replicas.


def device(name: str | None) -> contextlib.AbstractContextManager:
    """Returns a context in which the variables and the arithmetic of an average are placed.

    Args:
        name: A device such as `"CPU:0"`, or None for the current one.
    """


def place_like(variable: keras.Variable, other: keras.Variable) -> None:
    """Spreads a variable over devices as another one of the same shape is.

    Args:
        variable: The variable to place.
        other: A variable of the same shape.
    """


def strategy_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """Returns a context that distributes new variables as those of a model are."""


def on_each_replica(model: keras.Model, function: Callable[[], Any]) -> None:
    """Calls a function once on each replica of a model.

    Args:
        model: A model, replicated or not.
        function: Its result is dropped.
    """


def once(function: Callable[[], Any]) -> None:
    """Calls a function now, even inside a trace, and once for all replicas.

    Args:
        function: Its result is dropped.
    """


def replicas() -> int:
    """Returns how many replicas run the current code, 1 outside of replicas."""


def synchronize(variables: Sequence[keras.Variable]) -> list[Tensor]:
    """Returns values of variables that are equal on all replicas.

    Floats are averaged; of anything else it is the value of the first replica.
    Each replica has to call it, outside of conditions.

    Args:
        variables: The variables to read.
    """


# processes.py: several processes that train one model, each of which calls all of these.


def fetch(value: keras.Variable | Tensor) -> Any:
    """Returns a variable or a tensor as a NumPy array, also if it is spread over processes."""


def is_writer(model: keras.Model) -> bool:
    """Returns whether this process writes the files of a model for all that train it.

    Args:
        model: A `keras.Model` that has variables.
    """


def in_one_process(
    model: keras.Model, function: Callable[[], Any], variables: Iterable[keras.Variable] = ()
) -> Any:
    """Calls a function in the process that writes, while the others wait for it.

    Args:
        model: A `keras.Model` that has variables.
        function: `() ->` what JSON can encode. It assigns to no variable.
        variables: Those whose values it reads. Defaults to none.

    Returns:
        The result of the function, in all processes.

    Raises:
        Exception: Where the function is called, what it raises. In the other
            processes, an error of the same class if Python has it built in, or
            else a `RuntimeError`, with the same message.
        RuntimeError: If the other processes do not make this call.
    """


# checks.py: what cannot be trained where it is placed.


def check_placement(model: keras.Model, device: str | None) -> None:
    """Raises `ValueError` unless an average of a model can be placed.

    Args:
        model: The model to wrap.
        device: The device that was requested, or None.
    """


def check_compilation(
    model: keras.Model,
    arguments: Nested,
    run_eagerly: bool = False,
    jit_compile: bool | str = "auto",
    steps_per_execution: int = 1,
    **_: Any,
) -> None:
    """Raises `ValueError` if Keras cannot train a distributed model that is compiled so.

    Args:
        model: The model to compile.
        arguments: A nested structure that may contain optimizers.
        run_eagerly: As in `compile`.
        jit_compile: As in `compile`.
        steps_per_execution: As in `compile`.
    """


def check_method(model: keras.Model, method: str) -> None:
    """Raises `ValueError` if Keras cannot run a method of a distributed model.

    Args:
        model: A compiled model.
        method: Name of a method that trains or evaluates.
    """


# copying.py: what copies of models by structure need to know, see `polyak_model.average.copier`.


def copy_rules() -> dict[type, Callable]:
    """Returns how objects of the backend are copied: rules `(value, copier) -> copy` by class."""


def is_bookkeeping(name: str) -> bool:
    """Returns whether an attribute holds what the backend tracks, such as checkpoint dependencies.

    Args:
        name: Name of an attribute.
    """


def is_shared(value: Any) -> bool:
    """Returns whether a value of the backend without a rule is shared with the copy.

    Args:
        value: A tensor, a dtype, a constant table, a strategy, a dataset, ...

    Raises:
        TypeError: If it holds variables that cannot be copied.
    """


def track_copies(old: Any, new: Any, copier: Any) -> None:
    """Tracks in a copy the copies of what the backend tracks in the original.

    Args:
        old: The original.
        new: Its copy.
        copier: The copier that has copied everything else.
    """


# generators.py: the global generators of random numbers.


def unchanged_generators() -> contextlib.AbstractContextManager:
    """While open, code may draw random numbers; afterwards it is as if it had drawn none.

    This concerns the global generators of Python, NumPy, Keras and the backend:
    what a user draws or creates next is what it would have been.
    """
