"""An ordered queue of records on their way to a tracking server that may be away.

As long as the server answers, a record goes straight through. When it does not, records are kept in a file and sent
later, in order, so that losing the server costs training neither a crash nor more than a few percent of its time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Record = dict[str, Any]

STEP_BUDGET_S = 5.0  # longest time one `put` spends on what was kept before
WAIT_PER_FAILURE = 20.0  # seconds waited per second lost: a server that lets requests hang costs at most 5 %
MAX_GROUP = 25  # metric records sent as one request


class ServerAway(Exception):
    """The server could not be reached or failed; the same request may succeed later."""


class RequestRefused(Exception):
    """The server answered and refused; the same request would be refused again."""


class Outbox:
    """Sends records in order, keeps what cannot be sent now, and never raises because of the server.

    Args:
        send: sends records as one request. Raises ``ServerAway`` or ``RequestRefused``.
        folder: holds ``records.jsonl`` (kept records) and ``refused.jsonl`` (refused records, each with the server's
            words). It is made when the first record must be kept; what is in it at the start is sent first.
        retry_pause_s: shortest time in seconds between a failure and the next attempt.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Record]], None],
        folder: Path,
        retry_pause_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._retry_pause_s = retry_pause_s
        self._clock = clock
        self._next_attempt = float("-inf")
        self._warned_away = self._warned_refused = False
        self.folder = folder
        self.path = folder / "records.jsonl"
        self.refused_path = folder / "refused.jsonl"
        self.num_kept = 0
        if self.path.exists():
            self._write(self._read())  # a killed process may have left half a line

    def put(self, record: Record) -> None:
        """Send ``record`` now or keep it for later."""
        if self.num_kept == 0 and self._may_try() and self._deliver([record]) == 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.num_kept += 1
        if self._may_try():
            self.flush(STEP_BUDGET_S)

    def flush(self, budget_s: float) -> None:
        """Send kept records until none is left, the server is away, or ``budget_s`` seconds have passed."""
        if self.num_kept == 0:
            return
        deadline = self._clock() + budget_s
        records = self._read()
        num_sent = 0
        for group in _groups(records):
            num_done = self._deliver(group)
            num_sent += num_done
            if num_done < len(group) or self._clock() >= deadline:
                break
        if num_sent:
            self._write(records[num_sent:])
        if num_sent and not self.num_kept:
            log.warning("the MLflow server answers again: %d records were sent late", num_sent)

    def attempt(self, request: Callable[[], None]) -> bool:
        """Make a request; False when the server is away, which starts a pause. RequestRefused passes through."""
        start = self._clock()
        try:
            request()
        except ServerAway as error:
            now = self._clock()
            self._next_attempt = now + max(self._retry_pause_s, WAIT_PER_FAILURE * (now - start))
            if not self._warned_away:
                self._warned_away = True
                log.warning(
                    "the MLflow server does not answer (%s). Training goes on; what should be logged is kept in %s and "
                    "sent when the server is back. This warning is not repeated.",
                    error,
                    self.folder,
                )
            return False
        return True

    def _may_try(self) -> bool:
        return self._clock() >= self._next_attempt

    def _deliver(self, group: Sequence[Record]) -> int:
        """Send a group; how many of its records are done with. A refused record is: it is written aside."""
        try:
            if not self.attempt(lambda: self._send(group)):
                return 0
        except RequestRefused as error:
            if len(group) > 1:  # find the culprit
                return sum(1 for _ in takewhile(lambda record: self._deliver([record]) == 1, group))
            self._put_aside(group[0], str(error))
        return len(group)

    def _put_aside(self, record: Record, reason: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.refused_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "refused": reason}) + "\n")
        if not self._warned_refused:
            self._warned_refused = True
            log.warning(
                "the MLflow server refused a record: %s. Training goes on; refused records are in %s. This warning is "
                "not repeated.",
                reason,
                self.refused_path,
            )

    def _read(self) -> list[Record]:
        records: list[Record] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                log.warning("dropped a broken line of %s, left by a process that was killed while writing", self.path)
        return records

    def _write(self, records: Sequence[Record]) -> None:
        self.num_kept = len(records)
        if not records:
            self.path.unlink()
            remove_if_empty(self.folder)
            return
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        beside.replace(self.path)


def remove_if_empty(folder: Path) -> None:
    """Remove ``folder`` unless something is in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Cut into runs of at most ``MAX_GROUP`` metric records; any other record stands alone."""
    group: list[Record] = []
    for record in records:
        if group and ("metrics" not in record or "metrics" not in group[0] or len(group) == MAX_GROUP):
            yield group
            group = []
        group.append(record)
    if group:
        yield group
