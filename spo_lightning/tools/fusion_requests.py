"""HTTP requests to a SandboxFusion service: their pace, their retries, and the bounds of their answers."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

CONNECT_TIMEOUT = 10.0  # seconds
LONGEST_DELAY = 30.0  # seconds between two attempts, whatever the service asks for
MOST_ANSWER_BYTES = 2**24
_AGAIN = frozenset({408, 425, 429})  # of the statuses below 500, those that may pass


class FusionError(Exception):
    """The service could not do what was asked. Asking again would not help, or has not helped."""


class _Passing(Exception):
    """A failure that may pass.

    Args:
        text: what happened.
        delay: seconds that the service asks to wait.
    """

    def __init__(self, text: str, delay: float = 0.0) -> None:
        super().__init__(text)
        self.delay = delay


class RateLimit:
    """Spaces requests evenly. Used from several threads.

    Args:
        per_second: most requests a second; ``None`` for no limit.
        clock: seconds.
    """

    def __init__(self, per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 0.0 if per_second is None else 1 / per_second
        self._clock = clock
        self._next = clock()
        self._lock = threading.Lock()

    def delay(self) -> float:
        """Take the next place. Returns the seconds until it comes."""
        with self._lock:
            now = self._clock()
            place = max(now, self._next)
            self._next = place + self._interval
            return place - now


class FusionRequests:
    """Posts to a service until it answers. Used from several threads.

    Args:
        url: base URL.
        headers: of every request.
        timeout: seconds for one answer.
        retries: further attempts after a failure that may pass: no connection, no answer in time, one that is no JSON,
            status 408, 425, 429 or 5xx, or what ``check`` refuses.
        retry_delay: seconds before the first of them, twice as many before each next one, with up to half of it taken
            off at random.
        max_requests_per_second: attempts counted; ``None`` for no limit.
        max_concurrency: requests under way at once.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        timeout: float,
        retries: int,
        retry_delay: float,
        max_requests_per_second: float | None,
        max_concurrency: int,
    ) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        self._timeout = timeout
        self._retries = retries
        self._retry_delay = retry_delay
        self._rate = RateLimit(max_requests_per_second)
        self._places = threading.BoundedSemaphore(max_concurrency)
        self._closed = threading.Event()
        self._pool = urllib3.PoolManager(maxsize=max_concurrency, retries=False)

    def post(self, path: str, body: Mapping[str, Any], check: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        """Send JSON and wait for JSON.

        Args:
            path: behind the base URL.
            body: of the request.
            check: says what is wrong with an answer, "" for nothing.

        Raises:
            FusionError: no answer that ``check`` accepts.
        """
        data = json.dumps(body).encode()
        with self._places:
            for attempt in range(self._retries + 1):
                self._wait(self._rate.delay())
                try:
                    return self._attempt(path, data, check)
                except _Passing as error:
                    if attempt == self._retries:
                        raise FusionError(f"{error} (attempt {attempt + 1} of {self._retries + 1})") from error
                    backoff = self._retry_delay * 2**attempt * random.uniform(0.5, 1.0)
                    self._wait(min(max(backoff, error.delay), LONGEST_DELAY))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        """Drop connections; whoever waits for an attempt gives up."""
        self._closed.set()
        self._pool.clear()

    def _wait(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise FusionError("the client was closed")

    def _attempt(self, path: str, data: bytes, check: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        url = self._url + path
        try:
            response = self._pool.request(
                "POST",
                url,
                body=data,
                headers=self._headers,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=self._timeout),
                preload_content=False,
            )
            text = _read(response, time.monotonic() + self._timeout)
        except (HTTPError, OSError) as error:
            raise _Passing(f"{url} does not answer: {error}") from error
        if response.status != 200:
            problem = f"{url} answered {response.status}: {text[:200]!r}"
            if response.status in _AGAIN or response.status >= 500:
                raise _Passing(problem, _asked_delay(response.headers.get("Retry-After")))
            raise FusionError(problem)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Passing(f"{url} answered what is no JSON: {text[:200]!r}") from error
        problem = check(answer) if isinstance(answer, dict) else f"{text[:200]!r} is no JSON object"
        if problem:
            raise _Passing(f"{url} failed: {problem}")
        return answer


def _read(response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """The body. Raises FusionError when it is too long, TimeoutError when it drips in too slowly."""
    chunks, size = [], 0
    try:
        while chunk := response.read1(2**16):  # what has come, where read and stream would wait for more
            chunks.append(chunk)
            size += len(chunk)
            if size > MOST_ANSWER_BYTES:
                response.close()
                raise FusionError(f"an answer has more than {MOST_ANSWER_BYTES} bytes")
            if time.monotonic() > deadline:
                response.close()
                raise TimeoutError("the answer comes too slowly")
    finally:
        response.release_conn()
    return b"".join(chunks)


def _asked_delay(header: str | None) -> float:
    """Seconds of a ``Retry-After`` header; dates are not looked at."""
    return float(header) if header is not None and header.strip().isdecimal() else 0.0
