"""A stand-in for a vLLM server, for faults that a real one cannot be brought to on demand; it speaks the same routes.

The tests in ``tests/vllm`` are on real servers. Each token that this one samples is the number in the weights that it
holds, so a test sees in the tokens which weights sampled them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from spo_lightning.rollouts.weight_group import GroupInfo, WeightGroup

LOGPROB = -0.5


class FakeServer:
    """Faults are switched on by its attributes, at any time.

    Attributes:
        weights: number sampled. ``loaded`` has those that were pushed, in order.
        load_seconds, load_problem: time that a push takes, and what goes wrong with it; ``lost`` if that is on the way.
        join_problem: what goes wrong when it is to join a group.
        leave_after: buckets of a broadcast after which a worker closes its end.
        groups: those that it was told to join; ``received`` has what each worker was sent last, as bytes.
        workers, copies: of the model; each worker receives all that is broadcast.
        calls: what changed its state, in order.
        resets: whether it can reset its prefix cache.
        open_update: whether an update has begun that has not ended.
        known_tokens: from which on it was told to sample none.
        transfer, device: name of its weight-transfer back end, and of its device.
        sizes: of its model, as far as it tells.
        multimodal: whether it has loaded more than a language model.
        status: answered to generation requests.
        token_ids: whether each log-probability comes with its token.
        bad_prompt: first token of prompts that get tokens without a finite log-probability.
        token_seconds, tokens_per_chunk: pace of a stream.
        prompts: first tokens of the requests that came, in order; ``running`` is the number of those under way.
    """

    transfer: str | None = "spo"

    def __init__(self, **settings: Any) -> None:
        self.weights, self.name, self.loaded = 5, "default", []  # type: int, str, list[int]
        self.load_seconds, self.load_problem, self.lost = 0.0, "", False
        self.join_problem, self.leave_after = "", 1000
        self.groups: list[GroupInfo] = []
        self.received: list[list[Tensor]] = []
        self.workers, self.copies, self.device, self.multimodal = 1, 1, "cpu", False
        self.sizes: dict[str, int] = {}
        self.calls: list[str] = []
        self.resets, self.open_update = True, False
        self.known_tokens: int | None = None
        self._members: list[WeightGroup] = []
        self._problem = {"problem": "", "lost": False}
        self.status, self.bad_prompt, self.token_ids = 200, -1, True
        self.token_seconds, self.tokens_per_chunk = 0.005, 1
        self.prompts: list[int] = []
        self.running = 0
        self.keys: set[str | None] = set()
        self.__dict__ |= settings

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/weight_info", self._info)
        app.router.add_post("/collective_rpc", self._call)
        app.router.add_post("/update_weight_version", self._rename)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/get_world_size", self._sizes)
        app.router.add_post("/init_weight_transfer_engine", self._join)
        app.router.add_post("/start_weight_update", self._begin_update)
        app.router.add_post("/update_weights", self._update)
        app.router.add_post("/finish_weight_update", self._end_update)
        for path in ("/pause", "/resume", "/reset_prefix_cache"):
            app.router.add_post(path, self._note)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    def load(self, path: str) -> int:
        return int(Path(path).read_text())

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "policy", "max_model_len": 100_000}]})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.name})

    async def _agree(self, _: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def _note(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        return web.json_response({"success": self.resets})

    async def _sizes(self, request: web.Request) -> web.Response:
        copies = self.copies if request.query["include_dp"] == "true" else 1
        return web.json_response({"world_size": self.workers * copies})

    async def _rename(self, request: web.Request) -> web.Response:
        self.name = (await request.json())["new_version"]
        self.calls.append(self.name)
        return await self._agree(request)

    async def _begin_update(self, request: web.Request) -> web.Response:
        if self.open_update:
            return web.Response(status=500, text="Internal Server Error")
        self.open_update = True
        return await self._agree(request)

    async def _end_update(self, request: web.Request) -> web.Response:
        if not self.open_update:
            return web.Response(status=500, text="Internal Server Error")
        self.open_update = False
        return await self._agree(request)

    async def _join(self, request: web.Request) -> web.Response:
        info = GroupInfo(**(await request.json())["init_info"])
        self.groups.append(info)
        self._problem = {"problem": self.join_problem, "lost": True}
        if not self.join_problem:
            join = [asyncio.to_thread(WeightGroup, info, 1 + i, torch.device("cpu")) for i in range(self.workers)]
            self._members = await asyncio.gather(*join)
        return await self._agree(request)

    async def _update(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        what = (await request.json())["update_info"]
        await asyncio.sleep(self.load_seconds)
        self._problem = {"problem": self.load_problem, "lost": self.lost}
        if "buckets" in what and not self.load_problem:
            self.received = [[] for _ in self._members]
            receive = [asyncio.to_thread(self._receive, i, what) for i in range(len(self._members))]
            await asyncio.gather(*receive)
        if not self._problem["problem"]:
            self.weights = self.load(what.get("path", ""))
            self.loaded.append(self.weights)
        return await self._agree(request)

    def _receive(self, worker: int, what: dict[str, Any]) -> None:
        for bucket in what["buckets"]:
            if len(self.received[worker]) == self.leave_after:
                self._members[worker].close()
                self._problem = {"problem": "left", "lost": True}
                return
            size = sum(getattr(torch, dtype).itemsize * math.prod(shape) for _, dtype, shape in bucket)
            data = torch.empty(size, dtype=torch.uint8)
            self._members[worker].broadcast(data)
            self.received[worker].append(data)

    async def _call(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        body = await request.json()
        if body["method"] == "spo_describe":
            limits = {"max_model_len": 100_000, "vocab_size": 64, "max_logprobs": 1}
            result: Any = {"model": "policy", "dtype": "float32", "logprobs_mode": "processed_logprobs", **limits}
            result |= {"weight_transfer": self.transfer, "device": self.device, "multimodal": self.multimodal}
            result |= {"sizes": self.sizes}
        elif body["method"] == "spo_end_update":
            result, self.open_update = None, False
        elif body["method"] == "spo_hide_tokens":
            result, (self.known_tokens,) = None, body["args"]
        else:
            result = self._problem
        return web.json_response({"results": [result]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.prompts.append(body["token_ids"][0])
        if self.status != 200:
            return web.Response(status=self.status, text="no")
        response = web.StreamResponse()
        await response.prepare(request)
        self.running += 1
        with contextlib.suppress(ConnectionResetError):  # the client left
            await self._stream(response, body["sampling_params"]["max_tokens"], body["token_ids"][0] == self.bad_prompt)
        self.running -= 1
        return response

    async def _stream(self, response: web.StreamResponse, count: int, bad: bool) -> None:
        spans: list[dict[str, Any]] = []
        sent = 0
        while sent < count:
            tokens = [self.weights] * min(self.tokens_per_chunk, count - sent)
            sent += len(tokens)
            if spans and spans[-1]["version"] == self.name:
                spans[-1]["end"] = sent
            else:
                spans.append({"version": self.name, "end": sent})
            entry = {"logprob": -9999.0 if bad else LOGPROB, "text": "x" * 100}
            choice = {
                "token_ids": tokens,
                "logprobs": {"content": [entry | ({"token_id": t} if self.token_ids else {}) for t in tokens]},
                "finish_reason": "length" if sent == count else None,
                "weight_versions": spans if sent == count else None,
            }
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(self.token_seconds)
