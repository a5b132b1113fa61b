"""The seams: what a rollout engine and a reward must offer.

They are abstract classes rather than ``typing.Protocol``: jsonargparse takes a class for a protocol only when every
annotation is spelled the same, while a subclass is taken as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spo_lightning.types import Completion, Grade, RolloutRequest


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What an engine learns about the run before its first request.

    Attributes:
        model_path: folder or hub name the policy was loaded from (configuration, and weights to start from).
        tokenizer: the policy's tokenizer.
        device: where the trainer's rank computes, e.g. ``"cpu"`` or ``"cuda:0"``.
        dtype: name of the policy's dtype, e.g. ``"float32"``.
        eos_token_ids: tokens that end a completion.
        max_model_len: most tokens of prompt and completion together; ``None`` leaves it to the model's configuration.
        revision: hub revision of the policy.
        rank: number of this process among those of the run.
        world_size: processes of the run.
    """

    model_path: str
    tokenizer: Any
    device: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    max_model_len: int | None = None
    revision: str | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def known_tokens(self) -> int:
        """One more than the largest id that the tokenizer knows; embeddings from there on pad the vocabulary."""
        return max(self.tokenizer.get_vocab().values()) + 1


class RolloutEngine(ABC):
    """Streaming generation: requests go in at any time, finished completions come out as they finish.

    One contract serves batch collection (submit all, step until none is open), first-finished collection (submit more
    than needed, ``abort`` the rest), tool loops (a stop string ends a request, its continuation is a new request) and
    weights that change while requests are open.

    Attributes:
        runs_in_background: whether open requests also advance between two calls of ``step``, on other devices. They
            then stay open while the trainer updates the policy.
        computes_as_policy: whether it runs the policy's own model in the dtype of ``EngineContext``, so that in float32
            its log-probabilities are the trainer's but for rounding.
        ranks_per_engine: neighbouring ranks that drive one engine together (tensor parallelism). They make the same
            calls with the same requests in the same order, and get the same completions.
    """

    runs_in_background: bool = False
    computes_as_policy: bool = False
    ranks_per_engine: int = 1

    @abstractmethod
    def start(self, context: EngineContext) -> None:
        """Build the engine. Called before any other method, and again after ``close``."""

    @abstractmethod
    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests, each to go on from its partial completion if it has one.

        Raises:
            ValueError: an id is open already or comes twice, a prompt is empty, holds an id outside the vocabulary or
                leaves no room for a token, a seed is negative, or a partial completion is of another prompt or has
                ended; lists every problem. Nothing is queued then.
        """

    @abstractmethod
    def step(self) -> list[Completion]:
        """Advance every running request by at least one token; return the completions that finished."""

    @abstractmethod
    def abort(self, request_ids: Iterable[int]) -> list[Completion]:
        """Stop open requests; return, in the order given, what they have so far, ``finish_reason`` "aborted".

        Raises:
            KeyError: an id is not open; nothing is stopped then.
        """

    @abstractmethod
    def partials(self) -> list[Completion]:
        """What every open request has so far, in the order they were submitted; they stay open."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together; known once the engine is started."""

    @property
    @abstractmethod
    def num_open(self) -> int:
        """Requests submitted and neither returned nor aborted."""

    def take_idle_seconds(self) -> dict[str, float]:
        """What an engine that runs in the background idled since the last call, or the start, in seconds.

        Logged under ``timing/``, by name; ``engine_idle_s`` is the time in which no request was left to work on. Empty
        where it is not known, or where the engine works only when it is called.
        """
        return {}

    @abstractmethod
    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights in. Open requests keep their tokens and go on, with nothing cached from the old weights.

        Args:
            named_parameters: (name, full tensor) pairs, parameters and saved buffers, streamed one at a time under the
                policy's names; a tied one needs one name only.
            version: recorded with every token that these weights sample.

        Raises:
            ValueError: the parameters do not fit; ``step`` is then refused until a push succeeds.
        """

    @abstractmethod
    def sleep(self) -> None:
        """Release the device memory that only generation needs, until ``wake_up``."""

    @abstractmethod
    def wake_up(self) -> None:
        """Make ready to step again."""

    @abstractmethod
    def close(self) -> None:
        """Release everything."""


class Reward(ABC):
    """Grades completions against references. A subclass must offer ``grade``; the rest has sensible defaults."""

    @abstractmethod
    def grade(self, completions: Sequence[str], references: Sequence[str], prompts: Sequence[str]) -> list[Grade]:
        """One grade a completion, in order. What the grader cannot decide in time is an undecided grade."""

    def equivalent(self, answers: Sequence[tuple[str, str]]) -> list[bool]:
        """For each pair of extracted answers, whether they are one answer to maj@k; by default when equal as text."""
        return [first.strip() == second.strip() for first, second in answers]

    def check_references(self, references: Sequence[str]) -> list[int]:
        """Positions of references that can never be matched; asked for before training starts. By default none."""
        return []

    def close(self) -> None:  # noqa: B027 (most rewards hold nothing)
        """Release worker processes."""
