"""On PyTorch, several processes train in loops of one's own, in which one saves alone."""

from polyak_model.backend.common import fetch, in_one_process, is_writer

__all__ = ["fetch", "in_one_process", "is_writer"]
