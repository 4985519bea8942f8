"""How a PolyakModel and its averages come to have weights."""

import keras
from keras import tree

from polyak_model import backend
from polyak_model.average import clone_check, cloning
from polyak_model.backend import keras_internals
from polyak_model.wrapper.training_checks import check_optimizers


class Building(keras.Model):
    """Builds the raw model, and its averages as copies of it, which are then paired."""

    @staticmethod
    def _clone(model, clone_function, share_frozen):
        if share_frozen:
            return cloning.copy_model(model, keras_internals.frozen_weights(model))
        return cloning.clone_model(model, clone_function)

    def build(self, input_shape):
        """Builds the raw model, and the average model as its copy.

        Args:
            input_shape: Shape tuple, or a nested structure of them.
        """
        self._start_on(tree.map_shape_structure(keras.KerasTensor, input_shape))

    def _start_on(self, inputs, batch=None):
        if self.shadow.started:
            return
        with backend.strategy_scope(self):
            if not cloning.has_weights(self.raw_model):
                cloning.build_on(self.raw_model, inputs, batch)
        self._start(inputs, batch)

    def _start_if_built(self):
        if not self.shadow.started and cloning.has_weights(self.raw_model):
            self._start(clone_check.input_specs(self.raw_model))

    def _start(self, inputs, batch=None):
        for clone in self.shadow.models:
            if not cloning.has_weights(clone):
                self._complete(clone, inputs, batch)
        self.shadow.start(self.raw_model, inputs, self.name)
        self._refuse_quantization()
        if inputs is not None:
            keras_internals.record_inputs(self, inputs)
        self.built = True

    def _complete(self, clone, inputs, batch):
        with backend.strategy_scope(self), backend.device(self.shadow.device):
            if self.clone_function is None:
                shared = self.shadow.share_frozen
                shared = keras_internals.frozen_weights(self.raw_model) if shared else ()
                cloning.complete_clone(self.raw_model, clone, shared)
            else:
                with backend.unchanged_generators():
                    cloning.build_on(clone, inputs, batch)

    def _start_on_batch(self, data):
        if not self.shadow.started:
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            batch = x if backend.runs_eagerly() else None
            backend.once(lambda: self._start_on(backend.symbolic(x), batch))

    def _build_by_step(self, data):
        if self.shadow.started or keras_internals.has_call(self.raw_model):
            return
        if not cloning.has_weights(self.raw_model):
            backend.build_by_step(self.raw_model, data)
            # Parts that the step does not use are not built yet.
            backend.once(lambda: self._start(None))

    def _build_optimizer(self):
        if self.optimizer is not None and not self.optimizer.built:
            with backend.strategy_scope(self):
                self.optimizer.build(self.raw_model.trainable_variables)
            # A MultiOptimizer may have chosen its optimizers only now.
            check_optimizers(self.optimizer)
