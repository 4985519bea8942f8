"""Time and memory of `average_files`, compared with plain copying.

    python benchmarks/averaging_files.py

Time: the median of averaging all inputs, compared with reading them and writing
one output of their size with plain h5py, measured in alternation. Memory: the peak
resident set of a process that averages, minus that of one that only imports NumPy
and h5py.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import h5py
import numpy as np

from polyak_model.checkpoints import average_files

MEGABYTE = 10**6
AVERAGE = """
import sys
from polyak_model.checkpoints import average_files
average_files(sys.argv[2:], sys.argv[1])
assert not {"keras", "tensorflow"} & set(sys.modules)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=400, help="size of each file")
    parser.add_argument("--tensors", type=int, default=20, help="tensors in each file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read from disk, not from the cache")
    parser.add_argument("--skip", choices=["time", "memory"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(pathlib.Path(folder), options)
        output = pathlib.Path(folder, "output.weights.h5")
        print(f"{options.files} files of {options.megabytes} MB, {options.tensors} tensors each\n")
        if options.skip != "time":
            measure_time(paths, output, options.repeats, options.cold)
        if options.skip != "memory":
            measure_memory(paths, output)


def write_files(folder, options):
    """Writes files of random weights to average, and returns their paths."""
    generator = np.random.default_rng(0)
    size = options.megabytes * MEGABYTE // 4 // options.tensors
    paths = [folder / f"epoch-{n}.weights.h5" for n in range(options.files)]
    for path in paths:
        with h5py.File(path, "w") as file:
            for n in range(options.tensors):
                file[f"layers/dense_{n}/vars/0"] = generator.random(size, dtype="float32")
    return paths


def measure_time(paths, output, repeats, cold):
    """Prints median times of copying and of averaging, measured in alternation."""
    seconds = {"read all, write one": [], "average_files": []}
    for _ in range(repeats):
        for name, work in zip(seconds, (read_and_write, average_files), strict=True):
            if cold:
                forget(paths)
            begin = time.perf_counter()
            work(paths, output)
            seconds[name].append(time.perf_counter() - begin)
    baseline = statistics.median(seconds["read all, write one"])
    total = sum(path.stat().st_size for path in paths) / MEGABYTE
    print(f"{'':22}{'seconds':>9}{'MB/s read':>12}{'ratio':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:22}{median:9.2f}{total / median:12,.0f}{median / baseline:8.2f}")
    print()


def forget(paths):
    """Drops files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_and_write(paths, output):
    """Reads every tensor of every file and writes those of the last file."""
    for path in paths[:-1]:
        with h5py.File(path) as file:
            file.visititems(read)
    with h5py.File(paths[-1]) as file, h5py.File(output, "w") as target:
        file.visititems(lambda name, item: write(target, name, item))


def read(name, item):
    """Reads a tensor."""
    if isinstance(item, h5py.Dataset):
        item[()]


def write(target, name, item):
    """Copies a tensor."""
    if isinstance(item, h5py.Dataset):
        target[name] = item[()]


def measure_memory(paths, output):
    """Prints the peak memory of two processes."""
    bare = peak_megabytes("import h5py, numpy", output, paths)
    averaging = peak_megabytes(AVERAGE, output, paths)
    print(f"{'largest resident set':22}{'MB':>9}")
    print(f"{'Python, NumPy, h5py':22}{bare:9.0f}")
    print(f"{'average_files':22}{averaging:9.0f}")
    print(f"{'difference':22}{averaging - bare:9.0f}")


def peak_megabytes(program, output, paths):
    """Runs a program in a new process and returns its peak resident set, as Linux reports it."""
    # `resource` would include the memory of this process, which the new one is forked from.
    report = "\nprint(*(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    command = [sys.executable, "-c", program + report, output, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[1]) * 1024 / MEGABYTE


if __name__ == "__main__":
    main()
