"""How a PolyakModel is compiled and trained: as its raw model, and averages follow each step."""

from polyak_model import backend
from polyak_model.backend import keras_internals
from polyak_model.backend.common import optimizers_of
from polyak_model.wrapper.training_checks import check_counts_steps, check_optimizers


class Training(backend.Trainer):
    """Trains the raw model by its own training step, then updates the averages."""

    def compile(self, *args, **kwargs):
        """Compiles the raw model, and the other routes for evaluation.

        Args:
            *args: The arguments of the raw model's `compile`.
            **kwargs: The keyword arguments of the raw model's `compile`.

        Raises:
            ValueError: If the optimizer averages by itself (`use_ema=True`,
                `ScheduleFreeAdamW`), or a metric cannot be copied.

        Example:

        >>> import keras
        >>> from polyak_model import PolyakModel
        >>> inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model = PolyakModel(inner)
        >>> model.compile(optimizer="sgd", loss="mse", metrics=["mae"])
        >>> inner.optimizer is model.optimizer
        True
        """
        self.shadow.check_frozen()
        check_optimizers((args, kwargs))
        self._router.check_arguments((args, kwargs))
        backend.check_compilation(self.raw_model, (args, kwargs), **kwargs)
        with backend.strategy_scope(self):
            self.raw_model.compile(*args, **kwargs)
        self._adopt_compilation(args, kwargs)

    def _adopt_compilation(self, args=(), kwargs=None):
        raw = self.raw_model
        check_optimizers(raw.optimizer)
        backend.check_compilation(
            raw, raw.optimizer, raw.run_eagerly, raw.jit_compile, raw.steps_per_execution
        )
        with backend.strategy_scope(self):
            self._router.compile(args, kwargs)
            super().compile(
                optimizer=raw.optimizer,
                run_eagerly=raw.run_eagerly,
                steps_per_execution=raw.steps_per_execution,
                # XLA cannot compile a step that reaches across devices, only the raw one in it.
                jit_compile=raw.jit_compile and self.shadow.device is None,
                auto_scale_loss=False,
            )
        self.loss = raw.loss
        vars(self)["_adopted"] = self._compilation()

    def _compilation(self):
        return keras_internals.compilation(self.raw_model), self.raw_model.optimizer

    def _check_compiled(self, method):
        raw = self.raw_model
        if method in ("fit", "train_on_batch"):
            # Before Keras builds the optimizer for what is trained.
            self.shadow.check_frozen()
        if raw.compiled and self._compilation() != self._adopted:
            self._adopt_compilation()
        if raw.compiled:
            # Their settings may have changed, too.
            check_optimizers(optimizers_of(raw) if method == "fit" else raw.optimizer)
        if not self.compiled:
            raise ValueError(
                f"`{method}()` needs a compiled model. Received: a PolyakModel that was never "
                "compiled. Call model.compile(optimizer=..., loss=...) first, or compile the inner "
                "model before wrapping it."
            )
        backend.check_method(raw, method)

    def get_compile_config(self):
        return self.raw_model.get_compile_config()

    def compile_from_config(self, config):
        self.raw_model.compile_from_config(config)
        if self.raw_model.compiled:
            self._adopt_compilation()

    def _may_build_before_tracing(self):
        started = self.shadow.started and not self.run_eagerly
        return started and keras_internals.trains_as_keras_does(self.raw_model)

    def _build_on_batch(self, data):
        self._build_by_step(data)
        self._start_on_batch(data)
        self._router.build_metrics(data)
        self._build_optimizer()

    def _scored(self):
        return [self.raw_model]

    def _train_batch(self, data):
        self._build_by_step(data)
        self._start_on_batch(data)
        check_counts_steps(self.raw_model)
        self.shadow.check_frozen()
        before = backend.optimizer_step(self.raw_model)
        # A MultiOptimizer may have chosen its optimizers only now.
        check_optimizers(self.raw_model.optimizer)
        logs = self._train_raw(data)
        stepped = backend.optimizer_step(self.raw_model) > before
        self.shadow.first.pairing.check_raw()
        self.shadow.update(stepped, may_skip=backend.may_skip_steps(self.raw_model))
        return logs

    def _moved_pairs(self):
        return [pairing.averaged for pairing in self.shadow.pairings if pairing is not None]

    def _train_raw(self, data):
        def step(data):
            return backend.call_step(self.raw_model, "train_step", data)

        # With a device of its own for the average, only the raw step can be compiled by XLA.
        separate = self.shadow.device is not None and self.raw_model.jit_compile
        if separate and not backend.runs_eagerly():
            step = backend.compiled(step)
        return step(data)

    def make_train_function(self, force=False):
        backend.sync(self)
        self.shadow.catch_up()
        self.shadow.detector.stop()
        return super().make_train_function(force)
