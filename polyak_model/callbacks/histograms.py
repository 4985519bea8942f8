"""Writes histograms for TensorBoard, without TensorFlow."""

import os
import time
from collections.abc import Mapping

import numpy as np


class HistogramWriter:
    """Writes histograms to an event file.

    Args:
        folder: The folder of event files, which is created. TensorBoard shows
            them with those of `keras.callbacks.TensorBoard` where it is inside
            of the same log folder.

    Raises:
        ImportError: If TensorBoard is not installed.

    Example:

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> writer = HistogramWriter(folder)
    >>> writer.write({"average/dense/kernel": np.arange(6.0)}, step=3)
    >>> writer.flush()
    >>> len(os.listdir(folder))
    1
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError(
                "Histograms need TensorBoard, which cannot be imported. Received: "
                f"histograms={os.fspath(folder)!r}. Install it: pip install tensorboard"
            ) from error
        self._file = EventFileWriter(os.fspath(folder))

    def write(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Writes the histogram of each array.

        Args:
            arrays: A dict from tag to array. Entries that are inf or NaN are
                left out.
            step: Int.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        for tag, array in arrays.items():
            summary = histogram_pb(tag, array[np.isfinite(array)])
            self._file.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Writes what is pending to the file."""
        self._file.flush()
