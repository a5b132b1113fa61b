"""A rollout engine whose requests do nothing but take time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapify, heappop, heappush

import numpy as np
import torch

from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.types import Completion, FinishReason, RolloutRequest

from simulation.latencies import Latency


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which a worker was at one request.

    Attributes:
        worker: its number.
        request_id: as submitted.
        prompt: index of the prompt.
        began: seconds.
        ended: seconds.
    """

    worker: int
    request_id: int
    prompt: int
    began: float
    ended: float


@dataclass(slots=True)
class _Job:
    request_id: int
    prompt: int
    seed: int
    full: float
    remaining: float
    version: int | None  # of the weights that it began under
    worker: int | None = None
    began: float = 0.0


class SimulatedEngine(RolloutEngine):
    """Serves requests in the order they come, each by one worker, in simulated time.

    A request's seed decides its latency, so that the same seeds give the same latencies whatever the collection. A
    completion has a single token: what it tells the collector is under which weights it began. A request that was
    aborted goes on where it was when it comes again, at no cost.

    Args:
        latency: of the requests.
        workers: requests that are served at a time.

    Attributes:
        clock: seconds.
        spans: what the workers did.
        latencies: request id to full latency in seconds, of all requests.
        drawn: latencies of the requests that came for the first time.
    """

    def __init__(self, latency: Latency, workers: int) -> None:
        self.latency = latency
        self.clock = 0.0
        self.spans: list[Span] = []
        self.latencies: dict[int, float] = {}
        self.drawn: list[float] = []
        self._version = 0
        self._free = list(range(workers))
        self._jobs: dict[int, _Job] = {}
        self._waiting: list[int] = []
        self._finishes: list[tuple[float, int]] = []  # a heap of times and request ids
        self._aborted: dict[int, tuple[float, float]] = {}  # seed to full and remaining latency

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """See ``RolloutEngine``."""
        fresh = self.latency.at(np.array([uniform(request.seed) for request in requests])).tolist()
        for request, seconds in zip(requests, fresh, strict=True):
            seed = request.seed
            if seed not in self._aborted:
                self.drawn.append(seconds)
            full, remaining = self._aborted.pop(seed, (seconds, seconds))
            partial = request.partial
            version = partial.first_version if partial is not None and partial.num_sampled else None
            number = request.request_id
            self._jobs[number] = _Job(number, request.prompt_token_ids[0], seed, full, remaining, version)
            self.latencies[number] = full
            self._waiting.append(number)

    def step(self) -> list[Completion]:
        """Let time pass until a request finishes; its completion."""
        starting, self._waiting = self._waiting[: len(self._free)], self._waiting[len(self._free) :]
        for job in (self._jobs[number] for number in starting):
            job.worker, job.began = heappop(self._free), self.clock
            job.version = self._version if job.version is None else job.version
            heappush(self._finishes, (self.clock + job.remaining, job.request_id))
        self.clock, number = heappop(self._finishes)
        return [self._end(number, "stop")]

    def abort(self, request_ids: Iterable[int]) -> list[Completion]:
        """See ``RolloutEngine``."""
        partials = [self._end(number, "aborted") for number in request_ids]
        self._waiting = [number for number in self._waiting if number in self._jobs]
        self._finishes = [entry for entry in self._finishes if entry[1] in self._jobs]
        heapify(self._finishes)
        return partials

    def _end(self, number: int, reason: FinishReason) -> Completion:
        job = self._jobs.pop(number)
        if job.worker is not None:
            heappush(self._free, job.worker)
            self.spans.append(Span(job.worker, number, job.prompt, job.began, self.clock))
            job.remaining -= self.clock - job.began
        if reason == "aborted":
            self._aborted[job.seed] = (job.full, job.remaining)
        return replace(_completion(job.version, reason), request_id=number)

    def partials(self) -> list[Completion]:
        """See ``RolloutEngine``."""
        return [replace(_completion(job.version, "aborted"), request_id=n) for n, job in self._jobs.items()]

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Note the version; there are no parameters."""
        self._version = version

    @property
    def max_model_len(self) -> int:
        """See ``RolloutEngine``."""
        return 2

    @property
    def num_open(self) -> int:
        """See ``RolloutEngine``."""
        return len(self._jobs)

    def start(self, context: EngineContext) -> None:
        """Needs nothing."""

    def sleep(self) -> None:
        """Holds nothing."""

    def wake_up(self) -> None:
        """Holds nothing."""

    def close(self) -> None:
        """Holds nothing."""


def uniform(seed: int) -> float:
    """The number in (0, 1) that a seed of 63 bits stands for."""
    return ((seed >> 11) + 0.5) / 2**52


@lru_cache
def _completion(version: int | None, reason: FinishReason) -> Completion:
    """One token of a version, or none before a request began."""
    versions = torch.tensor([] if version is None else [version], dtype=torch.int64)
    zeros = torch.zeros_like(versions)
    return Completion(0, (0,), zeros, zeros.float(), torch.ones_like(versions, dtype=torch.bool), versions, "", reason)
