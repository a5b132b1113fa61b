"""Speed of the local sandbox beside a plain ``python -c`` for every program.

Run ``python scripts/bench_tools.py``. For two programs, and for 1, 8 and 64 threads that call at once, it prints calls
a second and the median and 99th percentile of a call's time in milliseconds, waiting in line included. "sandbox" is
``LocalSandbox`` with its modules preloaded; "python -c" starts an interpreter for each call, without any isolation.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from spo_lightning.tools import LocalSandbox

PROGRAMS = {
    "trivial": "print(1 + 1)",
    "sympy": "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 3*x + 2, x))",
}
ANSWERS = {"trivial": "2", "sympy": "[1, 2]"}


def time_calls(call: Callable[[str], str], program: str, calls: int, concurrency: int) -> tuple[float, float, float]:
    """Calls a second, median and 99th percentile of a call's milliseconds; every answer is checked."""

    def timed(_: int) -> float:
        start = time.perf_counter()
        answer = call(PROGRAMS[program]).strip()
        if answer != ANSWERS[program]:
            raise RuntimeError(f"the program {program!r} printed {answer!r} instead of {ANSWERS[program]!r}")
        return time.perf_counter() - start

    with ThreadPoolExecutor(concurrency) as threads:
        start = time.perf_counter()
        seconds = list(threads.map(timed, range(calls)))
        total = time.perf_counter() - start
    median, tail = np.percentile(seconds, [50, 99])
    return calls / total, 1e3 * float(median), 1e3 * float(tail)


def run_cold(program: str) -> str:
    """Output of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400, help="calls to the sandbox in each row")
    parser.add_argument("--cold-calls", type=int, default=40, help="starts of an interpreter in each row")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64], help="threads that call at once")
    parser.add_argument("--workers", type=int, default=None, help="programs at a time; the number of cores by default")
    arguments = parser.parse_args()
    start = time.perf_counter()
    sandbox = LocalSandbox(max_workers=arguments.workers, wall_time_s=60)
    sandbox.start()
    started = time.perf_counter() - start
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {sandbox.max_workers} programs at a time")
    print(f"start of the sandbox, once: {started:.2f} s")
    print(f"{'program':<9}{'how':<11}{'threads':>8}{'calls/s':>10}{'p50 ms':>10}{'p99 ms':>10}")
    ways: dict[str, tuple[Callable[[str], str], int]] = {
        "sandbox": (lambda program: sandbox.run(program).stdout, arguments.calls),
        "python -c": (run_cold, arguments.cold_calls),
    }
    for program in PROGRAMS:
        for how, (call, calls) in ways.items():
            for concurrency in arguments.concurrency:
                rate, median, tail = time_calls(call, program, calls, concurrency)
                print(f"{program:<9}{how:<11}{concurrency:>8}{rate:>10.1f}{median:>10.1f}{tail:>10.1f}", flush=True)
    sandbox.close()


if __name__ == "__main__":
    main()
