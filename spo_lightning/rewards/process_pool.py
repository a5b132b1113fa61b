"""Worker processes that may hang or die without taking anything else with them.

Why not a library: the pools on top of ``multiprocessing`` (pebble among them) start a worker by importing the program's
main module again, so a training script without a ``__main__`` guard would start itself once more, and one that imports
torch makes every replaced worker pay for that. Here a worker is a plain subprocess that knows nothing of the main
module.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

_START_LIMIT = 120.0  # seconds for the imports of a worker
_MAX_FAILED_STARTS = 3  # in a row


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How one task ended.

    Attributes:
        value: what the function returned; ``None`` when it did not.
        failure: "timeout" or "crash"; empty when the function returned.
    """

    value: Any
    failure: str = ""


class TimedPool:
    """Calls a module's functions in worker processes, each call under a time limit of its own.

    A call's clock starts when it is handed to a worker that has finished its imports, so neither a worker's start nor
    the queue counts. Workers start when first needed and stay until :meth:`close`, which also happens when the pool is
    collected and at exit; when this process is killed they die too. To be used by one thread at a time.

    Args:
        num_workers: most processes at a time.
        time_limit: seconds a single call may take; the process that exceeds it is killed and replaced.
        module: full name of the module; only the workers import it.
    """

    def __init__(self, num_workers: int, time_limit: float, module: str) -> None:
        self.num_workers = num_workers
        self.time_limit = time_limit
        self.module = module
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._finalizer: weakref.finalize | None = None

    def run(self, function: str, arguments: Sequence[tuple[Any, ...]]) -> list[TaskResult]:
        """Call the module's ``function(*arguments[i])`` for every i: one result each, in order.

        A call that takes too long, kills its process or raises (which ends the process with a traceback on stderr)
        leaves the others untouched.

        Raises:
            RuntimeError: workers cannot be started.
        """
        results: dict[int, TaskResult] = {}
        queue = deque(range(len(arguments)))
        try:
            while len(results) < len(arguments):
                self._fill(min(self.num_workers, len(arguments)))
                self._assign(queue, function, arguments)
                for worker, result in self._next_results():
                    if worker.task is not None:
                        results[worker.task] = result
                        worker.task = None
                    if result.failure:
                        self._discard(worker)
        finally:  # an interrupted call must not leave answers behind for the next one
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._discard(worker)
        return [results[i] for i in range(len(arguments))]

    def close(self) -> None:
        """Kill the workers and wait until they are gone. A later :meth:`run` starts new ones."""
        for worker in list(self._workers):
            self._discard(worker)

    def _fill(self, count: int) -> None:
        """Replace workers that died at rest and start as many as are missing."""
        for worker in [worker for worker in self._workers if worker.at_rest and not worker.alive]:
            self._discard(worker)
        while len(self._workers) < count:
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._failed_starts = 0
                raise RuntimeError(
                    f"{_MAX_FAILED_STARTS} worker processes in a row ended before they were ready, see their errors on "
                    f"stderr; this must work: {sys.executable} -c 'import {self.module}'"
                )
            self._workers.append(_Worker(self.module))
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def _assign(self, queue: deque[int], function: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        for worker in [worker for worker in self._workers if worker.at_rest]:
            if not queue:
                return
            if worker.start(queue[0], (function, arguments[queue[0]]), self.time_limit):
                queue.popleft()
            else:
                self._discard(worker)

    def _next_results(self) -> list[tuple[_Worker, TaskResult]]:
        """Wait until a worker has something to tell or has passed its deadline; readiness counts as a result too."""
        busy = [worker for worker in self._workers if not worker.at_rest]
        patience = min((worker.deadline for worker in busy), default=0.0) - time.monotonic()
        readable = wait([worker.connection for worker in busy], timeout=max(patience, 0.0))
        ended = []
        for worker in busy:
            starting = not worker.ready
            if worker.connection in readable:
                result = worker.receive()
            elif time.monotonic() > worker.deadline:
                result = TaskResult(None, "timeout")
            else:
                continue
            if starting:
                self._failed_starts = self._failed_starts + 1 if result.failure else 0
            ended.append((worker, result))
        return ended

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


class _Worker:
    """One process, what it is doing and until when it may."""

    def __init__(self, module: str) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "spo_lightning.rewards.worker", str(theirs.fileno()), module],
                stdin=subprocess.PIPE,  # never written to: its closing tells the worker that this process has ended
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
            )
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + _START_LIMIT

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def at_rest(self) -> bool:
        return self.ready and self.task is None

    def start(self, task: int, message: tuple[Any, ...], time_limit: float) -> bool:
        """Hand over a task; False when the process has died meanwhile."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return False
        self.task, self.deadline = task, time.monotonic() + time_limit
        return True

    def receive(self) -> TaskResult:
        """What a readable connection holds: a value (``None`` for "ready"), or the end of the process."""
        try:
            value = self.connection.recv()
        except (EOFError, OSError):  # before a message, or in the middle of one
            return TaskResult(None, "crash")
        self.ready = True
        return TaskResult(value)

    def kill(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.communicate()  # closes the pipe and waits


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the pool does not own the processes
        for worker in workers:
            worker.kill()
