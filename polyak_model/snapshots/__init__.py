"""Averages of any length, rebuilt from the snapshots of one training."""

from polyak_model.snapshots.rebuilding import rebuild
from polyak_model.snapshots.sweeping import sweep

__all__ = ["rebuild", "sweep"]
