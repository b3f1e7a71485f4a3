"""How long does `steep --help` take? Each time in a process of its own.

    python benchmarks/startup.py [--repeats 10] [--limit 0.5]

Prints the fastest, the median and the slowest time; the exit code is 1 if the median is above the limit (seconds).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--limit", type=float, default=0.5)
    arguments = parser.parse_args()
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "steep", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"steep --help: {min(seconds):.3f} / {median:.3f} / {max(seconds):.3f} s (fastest / median / slowest)")
    sys.exit(median > arguments.limit)


if __name__ == "__main__":
    main()
