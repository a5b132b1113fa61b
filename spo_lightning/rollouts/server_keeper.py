"""Brings servers to the weights wanted now and watches them: one path for a push, a late start and a return."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from spo_lightning.rollouts.server_checks import ServerCheck
from spo_lightning.rollouts.server_client import LOADING, ServerRefused, ServerUnavailable
from spo_lightning.rollouts.server_state import UNPUSHED, Job, Server, Target

log = logging.getLogger(__name__)

Looked = Callable[[list[tuple[Job, str]]], None]


class Keeper:
    """Runs once for each server, in a task of its own.

    Args:
        check: asked of a server before it is used.
        probe_interval: seconds between two looks at a server.
        looked: called after each look, with the jobs that failed at the server before it and the server being well.

    Attributes:
        target: the weights wanted; ``None`` while no server is to be used.
    """

    def __init__(self, check: ServerCheck, probe_interval: float, looked: Looked) -> None:
        self.target: Target | None = Target(0, UNPUSHED)
        self._check = check
        self._probe_interval = probe_interval
        self._looked = looked

    async def keep(self, server: Server) -> None:
        """Look after a server until cancelled."""
        while True:
            server.nudge.clear()
            if self.target is not None:
                self._looked(await self._look_after(server, self.target))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._probe_interval):
                    await server.nudge.wait()

    def lose(self, server: Server, cause: str, level: int = logging.WARNING) -> None:
        """Use a server no more until it is found well; its streams end."""
        if cause != server.logged:
            moved = len(server.streams)
            log.log(level, "%s is out of use: %s; requests moved: %d", server.client.url, cause, moved)
            server.logged = cause
            server.warned |= level >= logging.WARNING
        server.held, server.cause, server.answers, server.proven = None, cause, False, False
        server.suspects.clear()
        server.cancel()
        server.link.drop()

    async def _look_after(self, server: Server, target: Target) -> list[tuple[Job, str]]:
        """Push the weights where they are missing; the jobs that failed before this and cannot blame the server."""
        suspected = len(server.suspects)
        failed = []
        try:
            held = await self._bring(server, target)
        except (ServerUnavailable, ServerRefused) as error:
            server.refused = isinstance(error, ServerRefused)
            self.lose(server, str(error))
        else:
            if not target.matches(held):
                self._lose_to_others(server, held, target)
            elif self.target is target:
                self._use(server, held)
                failed = server.suspects[:suspected]
                del server.suspects[:suspected]
        server.tried = self.target is target
        return failed

    async def _bring(self, server: Server, target: Target) -> str:
        held = await server.client.weight_version()
        if server.held is not None:
            return held
        await self._check(server.client)
        if target.weights is not None and target.held is not None and held != target.held:
            server.loading = target.weights
            try:
                await server.client.load(target.weights, target.held, server.link)
            finally:
                server.loading = None
            held = target.held
        if target.matches(held) and not server.proven:
            await server.client.try_out()
            server.proven = True
        return held

    def _use(self, server: Server, held: str) -> None:
        if server.held is None:
            level = logging.WARNING if server.warned else logging.INFO  # a return is told where the loss was
            server.held, server.refused, server.answers, server.logged, server.warned = held, False, True, "", False
            log.log(level, "%s is in use with weights %r", server.client.url, held)

    def _lose_to_others(self, server: Server, held: str, target: Target) -> None:
        """Lose a server with other weights, and drop the tokens that these may have sampled."""
        if held != LOADING:  # no token comes between this name and the end of all streams
            for job in server.streams:
                job.cut_foreign([])
        taken = server.held is not None and target.held is not None  # on the other ranks it is what a push looks like
        cause = f"holds weights {held!r}, not version {target.version} of this run"
        self.lose(server, cause, logging.WARNING if taken else logging.INFO)
        server.answers = True
