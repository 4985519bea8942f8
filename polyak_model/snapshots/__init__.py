"""Averages of any length, rebuilt from the snapshots of one training."""

from polyak_model.snapshots.rebuilding import rebuild

__all__ = ["rebuild"]
