"""Cost of the tracker and of the prompt draw at scale, beside a dictionary with ``numpy.random.choice``.

Run ``python scripts/bench_core.py``. For each number of prompts it prints the median milliseconds of one tracker update
with 2,048 outcomes, of computing all sampling weights, of drawing 2,048 prompts, and of the three together, which is
what one iteration pays; then the same for one dictionary entry per prompt. The largest dictionary takes about 3 GB of
memory and a minute; ``--dictionary-limit`` leaves it out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from spo_lightning.algorithms import KLHalfLife, PrioritizedWeights, ValueTracker, draw_prompts

BATCH_SIZE = 2048
BARS_MS = {17_000: 1.0, 1_000_000: 100.0, 10_000_000: 1000.0}
Timings = tuple[float, float, float]


def median_ms(action: Callable[[], object], repeats: int) -> float:
    """Median wall-clock milliseconds of one call, the first call left out."""
    action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def time_tensors(num_prompts: int, repeats: int) -> Timings:
    """Milliseconds of update, weights and draw with this project's tracker."""
    generator = torch.Generator().manual_seed(0)
    tracker = ValueTracker(num_prompts, KLHalfLife())
    everyone = torch.arange(num_prompts)
    successes = torch.randint(0, 9, (num_prompts,), generator=generator)
    tracker.initialize(everyone, successes, torch.full((num_prompts,), 8))
    weigh = PrioritizedWeights()
    weights = weigh(tracker.value)
    index = draw_prompts(weights, BATCH_SIZE, generator)
    reward = torch.randint(0, 2, (BATCH_SIZE,), generator=generator)
    drift = torch.rand(BATCH_SIZE, generator=generator) / 50
    version = torch.zeros_like(index)
    return (
        median_ms(lambda: tracker.update(index, reward, drift, version), repeats),
        median_ms(lambda: weigh(tracker.value), repeats),
        median_ms(lambda: draw_prompts(weights, BATCH_SIZE, generator), repeats),
    )


def time_dictionary(num_prompts: int, repeats: int) -> Timings:
    """Milliseconds of update, weights and draw with one (alpha, beta) entry per prompt and NumPy's choice."""
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 9, num_prompts)
    counts = {row: (float(s) + 0.5, 8.5 - float(s)) for row, s in enumerate(rewards)}
    index = rng.choice(num_prompts, BATCH_SIZE, replace=False).tolist()
    outcomes = list(
        zip(index, rng.integers(0, 2, BATCH_SIZE).tolist(), (rng.random(BATCH_SIZE) / 50).tolist(), strict=True)
    )

    def update() -> None:
        for row, reward, drift in outcomes:
            factor = min(max(2 ** (-drift / 0.06), 0.875), 0.96)
            alpha, beta = counts[row]
            counts[row] = (factor * alpha + reward, factor * beta + 1 - reward)

    def weigh() -> np.ndarray:
        weights = [math.sqrt(alpha * beta) / (alpha + beta) + 0.05 for alpha, beta in counts.values()]
        return np.asarray(weights) / sum(weights)

    probabilities = weigh()

    def draw() -> None:
        np.random.choice(num_prompts, BATCH_SIZE, replace=False, p=probabilities)

    return median_ms(update, repeats), median_ms(weigh, repeats), median_ms(draw, repeats)


def row(label: str, num_prompts: int, timings: Timings, bar: float | None) -> str:
    """One line of the table."""
    verdict = "" if bar is None else f"{bar:>8,.0f}  {'holds' if sum(timings) <= bar else 'MISSED'}"
    columns = "".join(f"{value:>12,.3f}" for value in (*timings, sum(timings)))
    return f"{num_prompts:>12,}  {label:<11}{columns}  {verdict}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BARS_MS), help="numbers of prompts")
    parser.add_argument(
        "--dictionary-limit", type=int, default=10_000_000, help="most prompts the dictionary is tried with"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; more than one gains little below 10 million"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"milliseconds, median; {BATCH_SIZE:,} prompts a batch; {torch.get_num_threads()} torch thread(s)")
    headings = "".join(f"{name:>12}" for name in ("update", "weights", "draw", "sum"))
    print(f"{'prompts':>12}  {'':<11}{headings}  {'bar':>8}")
    for num_prompts in arguments.sizes:
        repeats = 200 if num_prompts < 100_000 else 10
        print(row("tensors", num_prompts, time_tensors(num_prompts, repeats), BARS_MS.get(num_prompts)), flush=True)
        if num_prompts <= arguments.dictionary_limit:
            repeats = 20 if num_prompts < 100_000 else 3
            print(row("dictionary", num_prompts, time_dictionary(num_prompts, repeats), None), flush=True)


if __name__ == "__main__":
    main()
