"""What the pool of servers keeps: the weights wanted, a job for each open request, and the state of each server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.server_client import Chunk, ServerClient
from spo_lightning.rollouts.server_weights import PushedWeights, WeightLink
from spo_lightning.types import FinishReason

UNPUSHED = "default"  # what vLLM says of weights that it loaded itself when it was started


@dataclass(frozen=True, slots=True)
class Target:
    """The weights wanted now.

    Attributes:
        version: recorded with every token.
        held: what a server calls them, "RUN/PUSH/VERSION"; ``None`` on ranks that do not push, which do not know the
            run and take that of any.
        weights: the set to push; ``None`` where there is nothing to push.
        push: which push of this run it is, so that two of one version differ.
    """

    version: int
    held: str | None
    weights: PushedWeights | None = None
    push: int = 0

    def matches(self, held: str) -> bool:
        """Whether a server that says it holds ``held`` has these weights."""
        return held == self.held if self.held is not None else held.endswith(f"/{self.push}/{self.version}")


@dataclass(eq=False, slots=True)
class Job:
    """An open request on its way.

    Attributes:
        row: the request and its tokens.
        order: its place in the order of submission.
        reason: why it ended, once it has.
        begin: tokens that it had when its last stream began.
        failures: streams in a row that broke off without a token, at servers that were found well afterwards.
    """

    row: OpenRequest
    order: int
    reason: FinishReason | None = None
    begin: int = 0
    failures: int = 0

    @property
    def rank(self) -> tuple[bool, int]:
        """The smallest goes first."""
        return not self.row.request.urgent, self.order

    def take(self, chunk: Chunk, version: int) -> None:
        """Take a chunk's tokens up to the one that ends the completion."""
        for token_id, logprob in zip(chunk.token_ids, chunk.logprobs, strict=True):
            self.failures = 0
            self.reason = self.row.append(token_id, logprob, version)
            if self.reason is not None:
                return

    def cut_foreign(self, spans: list[tuple[str, int]], held: str = "") -> None:
        """Drop the stream's tokens from the first that is not known to come from the weights ``held``.

        Args:
            spans: (weights, end) pairs of the whole stream, in order; empty when nothing is known.
            held: name of the weights that the stream was asked of.
        """
        own = 0
        for name, end in spans:
            if name != held:
                break
            own = end
        if self.begin + own < len(self.row.token_ids):
            self.row = self.row.cut(self.begin + own)
            self.reason = None


@dataclass(eq=False)
class Server:
    """What the pool knows of one server.

    Attributes:
        client: talks to it.
        link: how weights get there.
        held: what it was seen to hold when it became usable; ``None`` while it is not usable.
        cause: why it is not usable.
        logged: the cause that was logged last, since it was last usable.
        warned: whether a warning was logged since it was last usable.
        refused: whether that is a refusal, which will not pass by itself.
        tried: whether its keeper has dealt with the wanted weights, successfully or not.
        answers: whether it did what it was last asked; a server with other weights than the wanted ones may.
        proven: whether it has sampled a token since it was last lost.
        loading: the set that it is loading.
        turn: number of the last stream that was sent to it, counted over all servers.
        streams: running streams.
        suspects: jobs whose streams broke off, with the cause; it takes no others until its keeper has looked at it.
        nudge: wakes the keeper.
    """

    client: ServerClient
    link: WeightLink
    held: str | None = None
    cause: str = "was not asked yet"
    logged: str = ""
    warned: bool = False
    refused: bool = False
    tried: bool = False
    answers: bool = True
    proven: bool = False
    loading: PushedWeights | None = None
    turn: int = 0
    streams: dict[Job, asyncio.Task[None]] = field(default_factory=dict)
    suspects: list[tuple[Job, str]] = field(default_factory=list)
    nudge: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self) -> None:
        """End all its streams but the one that calls this."""
        for task in list(self.streams.values()):
            if task is not asyncio.current_task():
                task.cancel()
