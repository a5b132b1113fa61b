"""A rank does not outlive the process that started it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

POLL_S = 1.0

# Time in which a rank that is about to end does so by itself, or by the error of its broken connection.
GRACE_S = 10.0


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """While the block runs, end this process if the one that started it has ended.

    Only where ``LOCAL_RANK`` tells that a launcher started it: torchrun, or rank 0 for the other ranks of its node. A
    rank notices by its broken connections that another has died, but not before it next needs it, which may be hours.
    """
    finished = threading.Event()
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(), finished), daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def _watch(launcher: int, finished: threading.Event) -> None:
    while os.getppid() == launcher:
        if finished.wait(POLL_S):
            return
    if not finished.wait(GRACE_S):
        rank = os.environ["LOCAL_RANK"]
        print(f"error: local rank {rank} ends: its launcher, process {launcher}, has died", file=sys.stderr, flush=True)
        os._exit(1)
