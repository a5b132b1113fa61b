"""Rollout engine on vLLM servers of their own, on other GPUs or nodes: they sample while the trainer trains.

Tokens stream in over HTTP. A push ends the streams, gives every server the new weights and sends the requests again
with the tokens they have, so the version recorded with each token is exact. A server that dies, hangs or fails a push
is left out until it answers again and has been given the current weights; its requests go on elsewhere. How to start
servers: docs/servers.md. aiohttp and Transformers are imported in ``start``, so that naming this class in a
configuration costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.request_checks import check_requests, ids_to_abort
from spo_lightning.rollouts.server_thread import LoopThread
from spo_lightning.types import Completion, RolloutRequest

if TYPE_CHECKING:
    import aiohttp

    from spo_lightning.rollouts.server_pool import ServerPool
    from spo_lightning.rollouts.server_weights import WeightTransfer

API_KEY_VARIABLE = "SPO_VLLM_API_KEY"
BUCKET_BYTES = 2**28  # of weights, sent together
STEP_SECONDS = 0.1  # longest that step() waits for a completion; tools' results wait as long


class VLLMServerEngine(RolloutEngine):
    """Generates completions on running vLLM servers; implements ``RolloutEngine``.

    A request gets the same completion from any server, up to rounding of the logits, as long as it is not
    interrupted; what is sampled after an interruption depends on the seed and on where it was interrupted. Rank 0
    pushes weights; the other ranks use a server when it says that it holds the version they were told. Servers started
    on the policy's own checkpoint serve version 0 before the first push.

    Args:
        urls: base URLs of the servers, e.g. ``["http://10.0.0.7:8000"]``. Every rank uses all of them.
        weight_transfer: how pushed weights reach the servers. "nccl" broadcasts them from the GPU of rank 0 to those of
            each server, "gloo" from its host to theirs, "file" has them read ``weights_folder``. "auto" takes a file if
            there is such a folder, else NCCL where both ends are on CUDA, else Gloo.
        weights_folder: folder of this run alone that rank 0 and all servers see under this path. It needs room for two
            copies of the policy, and a third while a server is late to load one.
        transfer_address: of the machine of rank 0, as the servers reach it; ``None`` takes the one on the way to each.
        transfer_port: where the servers find rank 0 to form a group; 0 takes a free one. The group itself uses further
            ports, of Gloo's or NCCL's choice.
        weights_dtype: dtype that weights are pushed in, e.g. "bfloat16" for servers that run in it; ``None`` takes the
            policy's.
        api_key: sent as bearer token; the servers' ``--api-key``. ``None`` takes the environment variable
            ``SPO_VLLM_API_KEY`` if it is set, which keeps the key out of saved configurations.
        max_requests_per_server: most requests that this rank has open at one server; the others wait here. About the
            servers' ``--max-num-seqs``: rank 0 alone sends training requests. In benchmarks all ranks send, and the
            servers queue what is too much.
        startup_timeout_s: longest that ``start`` waits for the servers.
        stall_timeout_s: longest that a living server may take for a small answer, and to receive 256 MiB of weights
            (or one parameter, if that is larger). One that takes longer is left out until it answers.
        probe_interval_s: time between two looks at a server.
        push_timeout_s: longest that a server may take to load weights.
        give_up_after_s: time that ``step`` calls may wait without a token from any server, and a push without a server
            that takes it, until an error ends the run.
    """

    runs_in_background = True

    def __init__(
        self,
        urls: Sequence[str],
        weights_folder: str | None = None,
        weight_transfer: Literal["auto", "nccl", "gloo", "file"] = "auto",
        transfer_address: str | None = None,
        transfer_port: int = 0,
        weights_dtype: str | None = None,
        api_key: str | None = None,
        max_requests_per_server: int = 256,
        startup_timeout_s: float = 600.0,
        stall_timeout_s: float = 120.0,
        probe_interval_s: float = 2.0,
        push_timeout_s: float = 600.0,
        give_up_after_s: float = 1800.0,
    ) -> None:
        limits = {
            "startup_timeout_s": startup_timeout_s,
            "stall_timeout_s": stall_timeout_s,
            "probe_interval_s": probe_interval_s,
            "push_timeout_s": push_timeout_s,
            "give_up_after_s": give_up_after_s,
        }
        problems = [f"{name} is {value}; it must be positive" for name, value in limits.items() if value <= 0]
        urls = [url.rstrip("/") for url in urls]
        if not urls or len(set(urls)) < len(urls):
            problems.append(f"urls is {urls}; it must name at least one server, and none twice")
        bad = [url for url in urls if not url.startswith(("http://", "https://")) or url.endswith("/v1")]
        if bad:
            problems.append(f"urls holds {', '.join(bad)}; each must begin with http:// and end before /v1")
        if max_requests_per_server < 1:
            problems.append(f"max_requests_per_server is {max_requests_per_server}; it must be at least 1")
        if not 0 <= transfer_port < 2**16:
            problems.append(f"transfer_port is {transfer_port}; it must be in [0, 65535]")
        if weight_transfer not in (known := ("auto", "nccl", "gloo", "file")):
            problems.append(f"weight_transfer is {weight_transfer!r}; it must be one of {', '.join(known)}")
        elif (weights_folder is None) == (weight_transfer == "file") and weight_transfer != "auto":
            needs = "needs a folder" if weights_folder is None else "takes none"
            problems.append(f"weights_folder is {weights_folder}; weight_transfer {weight_transfer} {needs}")
        if problems:
            raise ValueError("bad VLLMServerEngine settings: " + "; ".join(problems))
        self.urls = urls
        self.weights_folder = None if weights_folder is None else Path(weights_folder).absolute()
        self.weight_transfer = weight_transfer
        self.transfer_address = transfer_address
        self.transfer_port = transfer_port
        self.weights_dtype = weights_dtype
        self.api_key = api_key
        self.max_requests_per_server = max_requests_per_server
        self.startup_timeout_s = startup_timeout_s
        self.stall_timeout_s = stall_timeout_s
        self.probe_interval_s = probe_interval_s
        self.push_timeout_s = push_timeout_s
        self.give_up_after_s = give_up_after_s
        self._thread: LoopThread | None = None

    def start(self, context: EngineContext) -> None:
        """Wait for the servers and check them.

        Raises:
            RuntimeError: the engine was started before, another run has the weights folder or the port, or there is no
                room for the weights.
            ConfigError: a server does not answer in time, cannot be sent weights or does not fit the run (another
                model, too short a length, missing options), or the policy cannot be pushed (see ``PolicyParameters``).
        """
        if self._thread is not None:
            raise RuntimeError("the engine is started already; start it once, or close() it first")
        self._run = uuid.uuid4().hex[:8] if context.rank == 0 else None
        self._transfer = self._weight_transfer(context)
        self._context = context
        self._weights_fit = True
        self._pushes = 0
        with contextlib.ExitStack() as undo:
            undo.callback(self._transfer.release)
            self._transfer.claim()
            thread = LoopThread("vllm-servers")
            undo.callback(thread.stop)
            thread.run(self._connect(context))
            undo.callback(lambda: thread.run(self._disconnect()))
            self._undo = undo.pop_all()
        self._thread = thread

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests, and send them as far as the servers have room."""
        thread = self._started()
        check_requests(requests, self._pool, self._limits.max_model_len, self._limits.vocab_size)
        tokenizer, eos = self._context.tokenizer, self._context.eos_token_ids
        rows = [OpenRequest(request, self._limits.max_model_len, tokenizer, eos) for request in requests]
        thread.call(self._pool.add, rows)

    def step(self) -> list[Completion]:
        """Wait until completions have finished, at most 0.1 s; those that have, in the order of their requests.

        Raises:
            RuntimeError: the last weight push failed, a server refused a request, one failed three times at servers
                that are well, or no token has come in ``give_up_after_s`` of waiting here; open requests then keep
                what they have.
        """
        thread = self._started()
        if not self._weights_fit:
            raise RuntimeError("the servers' weights are unusable; call update_weights() with a full set, then step()")
        return thread.run(self._pool.take(STEP_SECONDS, self.give_up_after_s))

    def abort(self, request_ids: Iterable[int]) -> list[Completion]:
        """Stop open requests; one that has finished since the last ``step`` keeps its real ``finish_reason``."""
        thread = self._started()
        return thread.call(self._pool.remove, ids_to_abort(request_ids, self._pool))

    def partials(self) -> list[Completion]:
        """What every open request has so far; one finished since the last ``step`` with its real ``finish_reason``."""
        return self._started().call(self._pool.partials)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together: the run's, or else the least among the servers."""
        self._started()
        return self._limits.max_model_len

    @property
    def num_open(self) -> int:
        """Requests submitted and neither returned nor aborted."""
        return 0 if self._thread is None else len(self._pool)

    def take_idle_seconds(self) -> dict[str, float]:
        """Seconds since the last call, or the start, in which requests of this rank were missing.

        ``engine_idle_s``: it had no unfinished one for any server. Requests that wait while no server is usable, or
        while all load weights, are unfinished. ``server_idle_mean_s`` and ``server_idle_max_s``, over the servers: none
        was at the server, whatever the reason.
        """
        return self._started().call(self._pool.take_idle_seconds)

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the servers new weights.

        Rank 0 copies the weights, to memory or to a file, while the servers still sample, and returns when at least one
        server holds them and every other one that answered before holds them or has failed. The other ranks read the
        parameters and return; they send requests to a server once it holds this version.

        Raises:
            ValueError: see ``RolloutEngine.update_weights``.
            RuntimeError: there is no room for the copy, or no server took them within ``give_up_after_s``; the same.
        """
        from spo_lightning.rollouts.server_state import Target

        thread = self._started()
        self._weights_fit = False
        self._pushes += 1
        try:
            weights = self._transfer.write(named_parameters, f"{self._run}-{self._pushes}")
            held = None if self._run is None else f"{self._run}/{self._pushes}/{version}"
            thread.run(self._pool.want(Target(version, held, weights, self._pushes), self.give_up_after_s))
        except BaseException:
            thread.call(self._pool.hold)
            raise
        finally:
            self._transfer.remove(kept=thread.call(self._pool.weights_in_use))
        self._weights_fit = True

    def sleep(self) -> None:
        """Nothing: the servers' devices are their own."""

    def wake_up(self) -> None:
        """Nothing: the servers do not sleep."""

    def close(self) -> None:
        """End all requests, let go of the weights and stop the background thread. The servers keep running."""
        if self._thread is not None:
            self._thread = None
            self._undo.close()

    def _started(self) -> LoopThread:
        if self._thread is None:
            raise RuntimeError("the engine is not started; call start() first")
        return self._thread

    def _weight_transfer(self, context: EngineContext) -> WeightTransfer:
        from spo_lightning.rollouts.server_broadcast import BroadcastSettings, BroadcastTransfer
        from spo_lightning.rollouts.server_files import FileTransfer
        from spo_lightning.rollouts.server_weights import WeightLayout, WeightTransfer

        layout = WeightLayout(context.model_path, context.revision, self.weights_dtype or context.dtype)
        if context.rank > 0:
            return WeightTransfer(layout)
        if self.weights_folder is not None:
            return FileTransfer(layout, self.weights_folder)
        settings = BroadcastSettings(
            self.weight_transfer,
            torch.device(context.device),
            self.transfer_address,
            self.transfer_port,
            self.stall_timeout_s,
            BUCKET_BYTES,
        )
        return BroadcastTransfer(layout, settings)

    async def _connect(self, context: EngineContext) -> None:
        import aiohttp
        from transformers import AutoConfig

        from spo_lightning.rollouts.server_checks import Limits, ServerCheck, connect
        from spo_lightning.rollouts.server_client import ServerClient
        from spo_lightning.rollouts.server_pool import ServerPool
        from spo_lightning.rollouts.server_state import Server
        from spo_lightning.rollouts.weight_group import MODEL_SIZES

        api_key = self.api_key or os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0))
        timeouts = (self.stall_timeout_s, self.push_timeout_s, self.give_up_after_s)
        clients = [ServerClient(url, session, *timeouts) for url in self.urls]
        only_language = self._transfer.layout.parameters.language_model_only
        config = AutoConfig.from_pretrained(context.model_path, revision=context.revision).get_text_config()
        sizes = {name: getattr(config, name, None) for name in MODEL_SIZES}
        check = ServerCheck(context.model_path, context.max_model_len, context.known_tokens, only_language, sizes)
        servers = [Server(client, self._transfer.link(number)) for number, client in enumerate(clients)]
        try:
            limits = await asyncio.gather(*(check.wait(client, self.startup_timeout_s) for client in clients))
            await asyncio.gather(*(connect(server.client, server.link) for server in servers))
        except BaseException:
            for server in servers:
                server.link.drop()
            await session.close()
            raise
        self._limits = Limits(min(one.max_model_len for one in limits), min(one.vocab_size for one in limits))
        self._session: aiohttp.ClientSession = session
        self._pool: ServerPool = ServerPool(servers, check, self.max_requests_per_server, self.probe_interval_s)

    async def _disconnect(self) -> None:
        try:
            await self._pool.close()
        finally:
            await self._session.close()
