"""The servers of a run and the requests spread over them; lives on one event loop, in one thread.

Each server has a keeper, a task that brings it to the weights wanted now and watches it. A server takes requests only
while its own engine process says that it holds the wanted weights, because that claim dies with the process. A stream
that breaks off, for whatever reason, puts its request back into the queue with the tokens it has. Whether the server or
the request is to blame shows when the keeper looks at the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from spo_lightning.rollouts.idle_time import IdleTime
from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.server_checks import ServerCheck
from spo_lightning.rollouts.server_client import ServerAway, ServerRefused, ServerUnavailable
from spo_lightning.rollouts.server_keeper import Keeper
from spo_lightning.rollouts.server_requests import request_body
from spo_lightning.rollouts.server_state import Job, Server, Target
from spo_lightning.rollouts.server_weights import PushedWeights
from spo_lightning.types import Completion

MOST_FAILURES = 3  # streams of a request that break off without a token, at servers that are well


class ServerPool:
    """Spreads requests over servers and keeps the servers' weights current.

    Args:
        servers: the run's, none of which was asked anything.
        check: asked of a server before it is used.
        max_streams: most requests open at one server.
        probe_interval: seconds between two looks at a server.
        clock: gives the seconds that ``take_idle_seconds`` counts.

    Attributes:
        idle_time: seconds in which no request was unfinished, usable servers or not.
    """

    def __init__(
        self,
        servers: Iterable[Server],
        check: ServerCheck,
        max_streams: int,
        probe_interval: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers = list(servers)
        self.idle_time = IdleTime(clock)
        self._server_idle_times = {server: IdleTime(clock) for server in self._servers}
        self._max_streams = max_streams
        self._keeper = Keeper(check, probe_interval, self._looked)
        self._open: dict[int, Job] = {}
        self._waiting: list[tuple[tuple[bool, int], Job]] = []  # a heap
        self._awaited = self._servers  # those that are expected to become usable
        self._submitted = 0
        self._sent = 0
        self._changed = asyncio.Event()
        self._problem = ""  # for the next take() to raise; no request is sent before
        self._broken = False  # by an error in this code
        self._waited = 0.0  # seconds in take() without a token
        self._keepers = [self._spawn(self._keeper.keep(server)) for server in self._servers]

    def add(self, rows: Iterable[OpenRequest]) -> None:
        """Queue requests."""
        for row in rows:
            job = Job(row, self._submitted)
            self._submitted += 1
            self._open[row.request.request_id] = job
            heapq.heappush(self._waiting, (job.rank, job))
        for server in self._servers:
            if server.answers and server.held is None:
                server.nudge.set()  # rank 0 may have given it the weights since it was looked at
        self._dispatch()

    async def take(self, wait: float, give_up_after: float) -> list[Completion]:
        """Completions that finished, in the order of their requests; waits for one at most ``wait`` seconds.

        Raises:
            RuntimeError: a server refused a request, one failed at servers that are well, or no token has come in
                ``give_up_after`` seconds of waiting here.
        """
        done = self._take_finished()
        if done or not self._open:
            return done
        self._raise_problem()
        self._dispatch()
        began = time.monotonic()
        await self._change(wait)
        self._raise_problem()
        self._waited += time.monotonic() - began
        done = self._take_finished()
        if not done and self._waited > give_up_after:
            self._waited = 0.0
            raise RuntimeError(
                f"no token has come from any server for {give_up_after:g} s: {self.causes()}. Start the servers again "
                f"and go on with step(); the {len(self._open)} open requests keep what they have"
            )
        return done

    def remove(self, request_ids: Iterable[int]) -> list[Completion]:
        """Forget requests and end their streams; what they have, with its real reason where it had finished."""
        jobs = [self._open.pop(request_id) for request_id in request_ids]
        for server in self._servers:
            for job in server.streams.keys() & set(jobs):
                server.streams[job].cancel()
        self._note_work()
        return [job.row.completion(job.reason or "aborted") for job in jobs]

    def partials(self) -> list[Completion]:
        """What every open request has, with its real reason where it has finished."""
        return [job.row.completion(job.reason or "aborted") for job in self._open.values()]

    def take_idle_seconds(self) -> dict[str, float]:
        """See ``VLLMServerEngine.take_idle_seconds``."""
        servers = [idle.take() for idle in self._server_idle_times.values()]
        return {
            "engine_idle_s": self.idle_time.take(),
            "server_idle_mean_s": sum(servers) / len(servers),
            "server_idle_max_s": max(servers),
        }

    def weights_in_use(self) -> set[PushedWeights]:
        """Sets that a server may still be given, or is loading."""
        sets = {server.loading for server in self._servers}
        sets.add(self._keeper.target.weights if self._keeper.target else None)
        return {weights for weights in sets if weights is not None}

    def __contains__(self, request_id: object) -> bool:
        """Whether a request was added and neither taken nor removed."""
        return request_id in self._open

    def __len__(self) -> int:
        return len(self._open)

    def hold(self) -> None:
        """End all streams and use no server until weights are wanted. Requests keep their tokens."""
        self._keeper.target = None
        for server in self._servers:
            server.held, server.cause, server.tried, server.refused = None, "waits for weights", False, False
            server.suspects.clear()
            server.cancel()

    async def want(self, target: Target, give_up_after: float) -> None:
        """Bring the servers to other weights.

        Where there are weights to push this waits until one server holds them, and every server that answered before
        holds them or has failed. Without, it returns at once.

        Raises:
            ValueError: no server takes them, and at least one refuses them.
            RuntimeError: no server took them within ``give_up_after`` seconds.
        """
        self._awaited = awaited = [server for server in self._servers if server.answers]
        self.hold()
        self._keeper.target = target
        self._waited = 0.0
        began = time.monotonic()
        for server in self._servers:
            server.nudge.set()
        while target.weights is not None:
            if self._broken:
                self._raise_problem()
            usable = any(server.held is not None for server in self._servers)
            if usable and all(server.tried for server in awaited):
                return
            failed = not usable and all(server.tried for server in self._servers)
            if failed and any(server.refused for server in self._servers):
                raise ValueError(
                    f"no server takes the weights of version {target.version}: {self.causes()}. Push the weights of "
                    "the model that the servers were started with"
                )
            if not usable and time.monotonic() - began > give_up_after:
                raise RuntimeError(
                    f"no server took the weights of version {target.version} within {give_up_after:g} s: "
                    f"{self.causes()}. Start the servers again, then push again"
                )
            await self._change(1.0)

    def causes(self) -> str:
        """One clause a server: why it is not usable."""
        return "; ".join(f"{s.client.url} {'is usable' if s.held is not None else s.cause}" for s in self._servers)

    async def close(self) -> None:
        """End all streams and keepers."""
        self.hold()
        for keeper in self._keepers:
            keeper.cancel()
        for server in self._servers:
            server.link.drop()
        streams = [task for server in self._servers for task in server.streams.values()]
        await asyncio.gather(*self._keepers, *streams, return_exceptions=True)

    def _looked(self, failed: list[tuple[Job, str]]) -> None:
        for job, cause in failed:
            job.failures += 1
            if job.failures >= MOST_FAILURES and self._open.get(job.row.request.request_id) is job:
                job.failures = 0
                self._blame(job, f"failed {MOST_FAILURES} times without a token at servers that are well", cause)
        self._dispatch()
        self._changed.set()

    def _dispatch(self) -> None:
        """Start streams for waiting requests, each at the usable server with the fewest."""
        limit = self._stream_limit()
        while self._waiting and not self._problem:
            usable = [s for s in self._servers if s.held and not s.suspects and len(s.streams) < limit]
            if not usable:
                break
            server = min(usable, key=lambda server: (len(server.streams), server.turn))
            _, job = heapq.heappop(self._waiting)
            if self._open.get(job.row.request.request_id) is job:
                self._sent += 1
                server.turn = self._sent
                task = self._spawn(self._run(server, job, str(server.held), self._version))
                server.streams[job] = task
                task.add_done_callback(partial(self._ended, server, job))
        self._note_work()

    def _stream_limit(self) -> int:
        """Most streams of a server now: a fair share while others still load weights, so that these get theirs."""
        coming = [server for server in self._awaited if not server.tried]
        if not coming:
            return self._max_streams
        usable = sum(server.held is not None for server in self._servers)
        unfinished = sum(job.reason is None for job in self._open.values())
        return min(self._max_streams, math.ceil(unfinished / (usable + len(coming))))

    @property
    def _version(self) -> int:
        assert self._keeper.target is not None
        return self._keeper.target.version

    async def _run(self, server: Server, job: Job, held: str, version: int) -> None:
        """Stream the rest of a request from a server that holds ``held``."""
        job.begin = len(job.row.token_ids)
        try:
            async with contextlib.aclosing(server.client.stream(request_body(job.row))) as stream:
                async for chunk in stream:
                    job.take(chunk, version)
                    self._waited = 0.0
                    if chunk.spans:
                        job.cut_foreign(chunk.spans, held)
                    if job.reason is not None:
                        break
                    if chunk.finish_reason is not None:
                        raise ServerUnavailable(f"ended a request early ({chunk.finish_reason})")
        except ServerAway as error:
            self._keeper.lose(server, str(error))
        except ServerUnavailable as error:
            server.suspects.append((job, str(error)))
            server.nudge.set()
        except ServerRefused as error:
            self._blame(job, f"was refused by {server.client.url}", str(error))

    def _ended(self, server: Server, job: Job, task: asyncio.Task[None]) -> None:
        """Called when a stream's task is done, even if it was cancelled before it began."""
        del server.streams[job]
        if job.reason is None:
            heapq.heappush(self._waiting, (job.rank, job))
        self._dispatch()
        self._changed.set()

    def _note_work(self) -> None:
        self.idle_time.note(idle=all(job.reason is not None for job in self._open.values()))
        for server, idle in self._server_idle_times.items():
            idle.note(idle=not server.streams)

    def _take_finished(self) -> list[Completion]:
        done = [request_id for request_id, job in self._open.items() if job.reason is not None]
        return self.remove(done)

    async def _change(self, seconds: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._note_failure)
        return task

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._problem, self._broken = f"the server pool failed: {task.exception()!r}", True
            self._changed.set()

    def _blame(self, job: Job, what: str, cause: str) -> None:
        self._problem = (
            f"request {job.row.request.request_id} {what}: {cause}. Compare the server's command with docs/servers.md, "
            "or abort the request; step() sends it again"
        )

    def _raise_problem(self) -> None:
        if self._problem:
            problem = self._problem
            if not self._broken:
                self._problem = ""
            raise RuntimeError(problem)
