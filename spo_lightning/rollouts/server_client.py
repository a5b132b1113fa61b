"""One vLLM server over HTTP: its state, its weights, and streams of sampled tokens. Asynchronous; holds no state."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.http_exceptions import BadHttpMessage

from spo_lightning.rollouts.server_requests import PROBE

if TYPE_CHECKING:
    from spo_lightning.rollouts.server_weights import PushedWeights, WeightLink

CONNECT_TIMEOUT = 10.0  # seconds
WORKER_EXTENSION = "spo_lightning.rollouts.server_worker.ServerWorker"
LOGPROB_FLOOR = -9999.0  # what vLLM sends in place of minus infinity and NaN
LOADING = "loading"  # name of the weights while they are replaced
LINE_LIMIT = 2**24  # bytes; a line holds all tokens since the last one, at 150 bytes each
AWAY = frozenset({404, 408, 429, 502, 503, 504})  # a proxy, or a server that takes no requests now
NOT_FROM_VLLM = (ValueError, LookupError, TypeError)  # what an answer gives that holds something else than vLLM's


class ServerUnavailable(Exception):
    """The server does not answer, broke off, or is broken itself; another may do."""


class ServerAway(ServerUnavailable):
    """An answer by which no server is behind the URL, or one that takes no requests now.

    Args:
        status: of the answer.
        text: what it says.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class ServerRefused(Exception):
    """The server answers that it will not do what was asked; asking again would not help."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream.

    Attributes:
        token_ids: sampled tokens.
        logprobs: of each, under the distribution it was drawn from.
        finish_reason: vLLM's, on the last piece: "stop", "length" or "abort".
        spans: on the last piece, (version, end): the weights that sampled the stream's tokens up to ``end``, in order.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    spans: list[tuple[str, int]]


class ServerClient:
    """Talks to one server.

    Args:
        url: base URL, e.g. ``"http://10.0.0.7:8000"``.
        session: of the running event loop.
        answer_timeout: seconds within which a living server answers a small request.
        push_timeout: seconds within which it loads weights.
        token_timeout: longest between two tokens of a request, and before the first; one may wait its turn for long.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        answer_timeout: float,
        push_timeout: float,
        token_timeout: float,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._answer_timeout = answer_timeout
        self._push_timeout = push_timeout
        self._token_timeout = token_timeout

    async def served_models(self) -> dict[str, int]:
        """Served model names, each with its length limit."""
        models = await self._call("GET", "/v1/models", field="data")
        return {model["id"]: model["max_model_len"] for model in models}

    async def describe(self) -> dict[str, Any]:
        """What ``ServerWorker.spo_describe`` says on the server's first worker.

        Raises:
            ServerRefused: the server lacks the worker extension, or the development mode that lets it be called.
        """
        try:
            results = await self._call("POST", "/collective_rpc", {"method": "spo_describe"}, field="results")
        except ServerAway as error:
            raise _lacking(error, "VLLM_SERVER_DEV_MODE=1 in its environment") from error
        except ServerUnavailable as error:
            if "no attribute 'spo_describe'" in str(error):
                raise ServerRefused(f"lacks --worker-extension-cls {WORKER_EXTENSION}") from error
            raise
        description: dict[str, Any] = results[0]
        return description

    async def hide_tokens(self, first: int) -> None:
        """Have its workers sample no token from ``first`` on."""
        await self._call("POST", "/collective_rpc", {"method": "spo_hide_tokens", "args": [first]})

    async def world_sizes(self) -> tuple[int, int]:
        """Workers of one copy of the model, and of all copies, which data parallelism makes."""
        path = "/get_world_size?include_dp="
        one, whole = [await self._call("GET", path + dp, field="world_size") for dp in ("false", "true")]
        return int(one), int(whole)

    async def weight_version(self) -> str:
        """The version its engine process was told last; "default" if none since it was started."""
        return str(await self._call("GET", "/weight_info", field="weight_version"))

    async def load(self, weights: PushedWeights, version: str, link: WeightLink) -> None:
        """Load weights, by vLLM's weight-transfer API, and name them.

        The name is taken away first and given last, so that a server with a version holds exactly these weights, has
        nothing cached from others, and runs.

        Args:
            weights: the full set.
            version: its name.
            link: how it gets there.

        Raises:
            ServerUnavailable: they did not get there, or the server does not answer.
            ServerRefused: they do not fit.
        """
        await link.connect(self)
        await self._name_weights(LOADING)
        await self._call("POST", "/pause?mode=abort&clear_cache=true", timeout=self._push_timeout)
        await self._call("POST", "/collective_rpc", {"method": "spo_end_update"}, self._push_timeout)
        await self._call("POST", "/start_weight_update", timeout=self._push_timeout)
        await link.send(self, weights)
        await self._call("POST", "/finish_weight_update", timeout=self._push_timeout)
        if not await self._call("POST", "/reset_prefix_cache", timeout=self._push_timeout, field="success"):
            raise ServerUnavailable("could not reset its prefix cache, which holds keys and values of the old weights")
        await self._call("POST", "/resume", timeout=self._push_timeout)
        await self._name_weights(version)

    async def join_transfer(self, group: Mapping[str, Any]) -> None:
        """Have the server's workers join a group, while the trainer joins it too.

        Args:
            group: a ``GroupInfo`` as a dictionary.

        Raises:
            ServerUnavailable: they did not.
        """
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": group}, self._push_timeout)
        await self._raise_weight_problem()

    async def update_weights(self, what: Mapping[str, Any]) -> None:
        """Have the server's workers take a full set of weights, between the begin and the end of an update.

        Args:
            what: a ``PushInfo`` as a dictionary.

        Raises:
            ServerUnavailable: the weights did not get there.
            ServerRefused: they do not fit.
        """
        await self._call("POST", "/update_weights", {"update_info": what}, self._push_timeout)
        await self._raise_weight_problem()

    async def try_out(self) -> None:
        """Have it sample a token, within the time that it may take to load weights.

        Raises:
            ServerUnavailable: it does not.
            ServerRefused: it lacks the route.
        """
        try:
            async for _ in self.stream(PROBE, self._push_timeout):
                pass
        except ServerAway as error:
            raise _lacking(error, "--enable-scale-out") from error

    async def stream(self, body: Mapping[str, Any], patience: float | None = None) -> AsyncGenerator[Chunk, None]:
        """Send a generation request; its tokens as they come. Leaving the iterator ends the request on the server.

        Args:
            body: the request.
            patience: seconds in place of ``token_timeout``.

        Raises:
            ServerUnavailable: no token came in time, the stream broke off, or it is none that vLLM would send.
            ServerRefused: the request is not accepted.
        """
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT, sock_read=patience or self._token_timeout)
        url = f"{self.url}/inference/v1/generate"
        try:
            async with self._session.post(url, json=body, timeout=timeout, read_bufsize=LINE_LIMIT) as response:
                await _check(response)
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        chunk = _chunk(json.loads(line[len(b"data: ") :]))
                        yield chunk
                        if chunk.finish_reason is not None:
                            return
        except (aiohttp.ClientError, BadHttpMessage, OSError, TimeoutError, *NOT_FROM_VLLM) as error:
            raise ServerUnavailable(_text(error)) from error
        raise ServerUnavailable("the stream ended before the completion did")

    async def _raise_weight_problem(self) -> None:
        results = await self._call("POST", "/collective_rpc", {"method": "spo_weight_problem"}, field="results")
        with expecting_vllm("/collective_rpc"):
            found = [result for result in results if result["problem"]]
            text = "; ".join(sorted({result["problem"] for result in found}))
            lost = all(result["lost"] for result in found)
        if found:
            raise ServerUnavailable(text) if lost else ServerRefused(text)

    async def _name_weights(self, version: str) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": version})

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        field: str | None = None,
    ) -> Any:
        """Send a request that has a short answer; a field of it, or all."""
        limit = aiohttp.ClientTimeout(total=timeout or self._answer_timeout, sock_connect=CONNECT_TIMEOUT)
        route = path.partition("?")[0]
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=limit) as response:
                with expecting_vllm(route):
                    await _check(response)
                    answer = await response.json()
                    return answer if field is None else answer[field]
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerUnavailable(f"{route}: {_text(error)}") from error


@contextmanager
def expecting_vllm(what: str) -> Iterator[None]:
    """Around the reading of an answer: one of another form than vLLM's is that of a server that is not to be used.

    Raises:
        ServerUnavailable: it has another form.
    """
    try:
        yield
    except NOT_FROM_VLLM as error:
        raise ServerUnavailable(f"{what} did not answer as vLLM does: {_text(error)}") from error


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status >= 400:
        text = (await response.text(errors="replace"))[:500]
        if response.status == 401:
            text += "; give SPO_VLLM_API_KEY the servers' --api-key"
        raise _failure(response.status, f"{response.url.path} answered {response.status}: {text}")


def _failure(status: int, text: str) -> ServerUnavailable | ServerRefused:
    if status in AWAY:
        return ServerAway(status, text)
    return ServerRefused(text) if 400 <= status < 500 else ServerUnavailable(text)


def _lacking(error: ServerAway, what: str) -> ServerUnavailable | ServerRefused:
    """A route that is missing at a server whose other routes answer is one that was not switched on."""
    return ServerRefused(f"lacks {what}: {error}") if error.status == 404 else error


def _chunk(event: dict[str, Any]) -> Chunk:
    if "error" in event:
        error = event["error"]
        raise _failure(error["code"], f"{error['code']}: {error['message']}")
    choice = event["choices"][0]
    token_ids = choice["token_ids"] or []
    entries = choice["logprobs"]["content"]
    if any("token_id" not in entry for entry in entries):
        raise ServerRefused("its vLLM does not say which token a log-probability is of: start it with 0.32 or later")
    logprobs = [entry["logprob"] for entry in entries]
    if [entry["token_id"] for entry in entries] != token_ids or any(value <= LOGPROB_FLOOR for value in logprobs):
        raise ServerUnavailable(f"sent no finite log-probability for each sampled token: {token_ids}, {logprobs}")
    spans = [(span["version"], span["end"]) for span in choice["weight_versions"] or []]
    return Chunk(token_ids, logprobs, choice["finish_reason"], spans)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
