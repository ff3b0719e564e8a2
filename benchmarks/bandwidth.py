"""Measure how fast this machine reads memory: what bounds the tokens per second of one sequence.

    python benchmarks/bandwidth.py

An array that no cache holds is read whole by NumPy, in as many equal parts as there are threads: its sum, its maximum,
and the square of its norm, which differ in how much they compute for a number. The fastest of all counts, since what is
read cannot have come faster than the machine can give it. Below it stands the same for an array that a core's cache
holds. `generation.py` calls `read_bandwidth`.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

# Not `np.dot`, which starts threads of its own.
READERS = {"sum": np.sum, "maximum": np.max, "square of the norm": lambda x: np.einsum("i,i->", x, x)}
MEGABYTES = 1024


class Reading(NamedTuple):
    """How fast an array was read: bytes per second of each round."""

    reader: str
    num_threads: int
    rates: list[float]

    @property
    def best(self) -> float:
        """The fastest round."""
        return max(self.rates)


def read_bandwidth(max_threads: int, megabytes: float = MEGABYTES, num_rounds: int = 5) -> list[Reading]:
    """Read an array in every way, by turns, on 1, 2, 4, ... threads and on as many as allowed.

    Args:
        max_threads: the most threads at a time.
        megabytes: the size of the array.
        num_rounds: how often each way is taken.

    Returns:
        A reading for each way.
    """
    array = np.ones(int(megabytes * 2**20) // 4, "float32")
    repeats = max(1, int(MEGABYTES / megabytes))  # a small one is over before the threads have started
    counts = sorted({1 << i for i in range(max_threads.bit_length()) if 1 << i <= max_threads} | {max_threads})
    readings = [Reading(name, count, []) for count in counts for name in READERS]
    for _ in range(num_rounds):
        for name, count, rates in readings:
            rates.append(array.nbytes * repeats / _seconds(READERS[name], np.array_split(array, count), repeats))
    return readings


def _seconds(reader, parts: list[np.ndarray], repeats: int) -> float:
    """Time reading all parts at the same time; NumPy lets other threads run meanwhile."""

    def read(part):
        for _ in range(repeats):
            reader(part)

    with ThreadPoolExecutor(len(parts)) as pool:
        start = time.perf_counter()
        list(pool.map(read, parts))
        return time.perf_counter() - start


def main() -> None:
    """Print a line for each way of reading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    for megabytes in (MEGABYTES, 0.25):
        print(f"an array of {megabytes} MiB, GB/s: fastest, median")
        for reading in read_bandwidth(arguments.threads, megabytes):
            median = statistics.median(reading.rates)
            name = f"{reading.reader}, {reading.num_threads} threads"
            print(f"  {name:32} {reading.best / 1e9:7.1f} {median / 1e9:7.1f}")


if __name__ == "__main__":
    main()
