"""Callbacks of `fit`: checkpoints, snapshots and monitoring of averages."""

from polyak_model.callbacks.checkpoint import AverageCheckpoint
from polyak_model.callbacks.monitor import AverageMonitor
from polyak_model.callbacks.snapshots import AverageSnapshots

__all__ = ["AverageCheckpoint", "AverageMonitor", "AverageSnapshots"]
