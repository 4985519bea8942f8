"""Files are written in the background in order, and no error is lost."""

import subprocess
import sys
import threading

import pytest

from polyak_model.weight_files.background import BackgroundWriter


def fail():
    raise OSError("the disk is full")


def test_the_caller_goes_on_while_a_file_is_written():
    writer, go_on, written = BackgroundWriter(), threading.Event(), []
    writer.write(lambda: (go_on.wait(), written.append("a")))
    assert not written
    go_on.set()
    writer.wait()
    assert written == ["a"]


def test_files_are_written_one_after_another_in_the_order_of_the_calls():
    writer, events = BackgroundWriter(), []
    for name in range(20):
        writer.write(lambda name=name: events.extend([("begin", name), ("end", name)]))
    writer.wait()
    assert events == [(what, name) for name in range(20) for what in ("begin", "end")]


def test_an_error_is_raised_once_by_the_next_call():
    writer, written = BackgroundWriter(), []
    writer.write(fail)
    with pytest.raises(OSError, match="the disk is full"):
        writer.write(lambda: written.append("a"))
    assert not written
    writer.wait()
    writer.write(fail)
    with pytest.raises(OSError, match="the disk is full"):
        writer.wait()
    writer.write(lambda: written.append("b"))
    writer.wait()
    assert written == ["b"]


@pytest.mark.processes
def test_python_waits_for_the_last_file_and_prints_an_error_that_was_not_raised(tmp_path):
    program = f"""
import pathlib, time
from polyak_model.weight_files.background import BackgroundWriter
def write():
    time.sleep(0.5)
    pathlib.Path({str(tmp_path / "a")!r}).touch()
    raise OSError("Cannot write 'a': the disk is full.")
writer = BackgroundWriter()
writer.write(write)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (tmp_path / "a").exists()
    told = "polyak_model: a file was not written. Cannot write 'a': the disk is full."
    assert told in result.stderr
