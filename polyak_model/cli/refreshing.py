"""Refreshes BatchNormalization statistics in what a command writes: the option `--refresh`."""

import contextlib
import pathlib
import tempfile

from polyak_model.errors import InputError
from polyak_model.weight_files.npz import load_inputs
from polyak_model.weight_files.output import check_output, writing
from polyak_model.weight_files.reader import open_weights


def check_refreshable(output, files):
    """Checks that the statistics in an average of files can be refreshed, and its output written.

    Args:
        output: Path of the file to write.
        files: Paths of the files that are averaged.

    Raises:
        InputError: If one is no `.keras` file, or the output cannot be written.
    """
    for path in files:
        if not str(path).endswith(".keras"):
            raise InputError(
                f"`--refresh` needs .keras files, which contain the model. Received: "
                f"{str(path)!r}. "
                "Leave it out, and refresh the statistics with polyak_model.refresh_statistics."
            )
    check_output(output, (".keras", ".weights.h5"), files)


@contextlib.contextmanager
def refreshing(output, data):
    """Refreshes the statistics of a model that is written inside the block.

    Args:
        output: Path of the `.keras` or `.weights.h5` file to write at the end.
        data: Path of an .npz file with inputs, or None: nothing is refreshed.

    Yields:
        The path to write to: `output` or, with data, a temporary `.keras` file.

    Raises:
        InputError: If the data cannot be used, or the output cannot be written.
    """
    if data is None:
        yield output
        return
    inputs = load_inputs(data)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        yield path
        with open_weights(path) as weights:
            config = weights.config
        # Keras takes seconds to import. Everything that can be checked without it comes before.
        from polyak_model.scoring import load_model
        from polyak_model.snapshots.refreshing import refresh

        model = load_model(path, config)
        refresh(model, inputs)
        with writing(output) as partial:
            model.save(partial) if output.name.endswith(".keras") else model.save_weights(partial)
