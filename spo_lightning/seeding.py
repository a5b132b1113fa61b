"""Seeds derived from (run seed, what they are for): every draw is reproducible, also after a restart."""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np
import torch


class SeedStream(IntEnum):
    """What a derived seed is for; two streams never share seeds."""

    ITERATION = 0
    ROLLOUT = 1
    EVALUATION = 2
    VALUE_START = 3
    MINIBATCH = 4
    CONTINUATION = 5


def derive_seed(seed: int, stream: SeedStream, *position: int) -> int:
    """A 63-bit seed for one position of a stream, e.g. ``(iteration, row)``.

    Uses NumPy's ``SeedSequence``, whose hash keeps neighbouring positions independent.

    Raises:
        ValueError: ``seed`` or a position is negative.
    """
    words = (seed, int(stream), *position)
    if min(words) < 0:
        raise ValueError(f"seeds and positions must not be negative, got {words}; choose a seed of 0 or more")
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed torch, numpy and python for one iteration of one rank.

    Reseeding instead of saving generator states makes a resumed iteration equal to an uninterrupted one by
    construction.
    """
    value = derive_seed(seed, SeedStream.ITERATION, iteration, rank)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
