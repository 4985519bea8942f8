"""Which threads train a model, so that others leave its average alone."""

import contextlib
import threading


class TrainingThreads:
    """The threads that train a model at the moment."""

    def __init__(self):
        self._lock = threading.Lock()
        self._threads = []

    @contextlib.contextmanager
    def joined(self):
        """While open, the current thread is one of them."""
        with self._lock:
            self._threads.append(threading.get_ident())
        try:
            yield
        finally:
            with self._lock:
                self._threads.remove(threading.get_ident())

    @contextlib.contextmanager
    def held(self):
        """While open, none joins or leaves; yields whether another thread is one of them."""
        with self._lock:
            yield any(thread != threading.get_ident() for thread in self._threads)
