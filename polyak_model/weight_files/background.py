"""Writes files in a thread of their own while training goes on."""

import atexit
import sys
import threading
import weakref

_writers: weakref.WeakSet = weakref.WeakSet()


class BackgroundWriter:
    """Writes the files of one model, one after another, in the order of the calls.

    A write begins after the one before has ended, so no more than one is under
    way and no more than its data are kept. What it raises is raised by the next
    call of `write` or `wait`; if there is none, it is printed when Python exits.

    Example:

    >>> files = []
    >>> writer = BackgroundWriter()
    >>> for name in ("a", "b"):
    ...     writer.write(lambda name=name: files.append(name))
    >>> writer.wait()
    >>> files
    ['a', 'b']
    """

    def __init__(self):
        self._thread = None
        self._error = None
        _writers.add(self)

    def write(self, function):
        """Calls a function in a thread, once the call before it has ended.

        Args:
            function: `() -> None`.

        Raises:
            Exception: What the call before raised; `function` is not called then.
        """
        self.wait()
        # Python waits for this thread, which is no daemon, before it exits.
        self._thread = threading.Thread(target=self._run, args=(function,), name=__name__)
        self._thread.start()

    def wait(self):
        """Waits until no write is under way.

        Raises:
            Exception: What the last write raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, function):
        try:
            function()
        except Exception as error:
            self._error = error


@atexit.register
def _print_errors():
    for writer in _writers:
        if writer._error is not None:
            print(f"polyak_model: a file was not written. {writer._error}", file=sys.stderr)
