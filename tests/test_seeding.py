"""Seeds depend on the run's seed, the stream and the position, and on nothing else."""

import random

import numpy as np
import pytest
import torch

from spo_lightning.seeding import SeedStream, derive_seed, seed_iteration


def test_seeds_differ_by_seed_stream_and_position():
    seeds = {
        derive_seed(seed, stream, a, b)
        for seed in range(3)
        for stream in SeedStream
        for a in range(10)
        for b in range(10)
    }
    assert len(seeds) == 3 * len(SeedStream) * 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_process_and_release():
    reference = np.random.SeedSequence([7, 1, 2, 3]).generate_state(1, np.uint64)[0]
    assert derive_seed(7, SeedStream.ROLLOUT, 2, 3) == int(reference) // 2


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="choose a seed of 0 or more"):
        derive_seed(-1, SeedStream.ROLLOUT)


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_seed_iteration_seeds_all_three_generators():
    seed_iteration(1, 5, 0)
    first = draws()
    seed_iteration(1, 5, 1)
    other_rank = draws()
    seed_iteration(1, 5, 0)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other_rank, strict=True))
