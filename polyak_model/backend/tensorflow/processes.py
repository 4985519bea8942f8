"""On TensorFlow, Keras trains in one process."""

from polyak_model.backend.common import fetch, in_one_process, is_writer

__all__ = ["fetch", "in_one_process", "is_writer"]
