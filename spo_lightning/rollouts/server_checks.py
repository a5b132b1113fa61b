"""Whether a server is one that can serve this run; asked at the start, and again whenever a server comes back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from spo_lightning.errors import ConfigError
from spo_lightning.rollouts.server_client import LOADING, ServerClient, ServerRefused, ServerUnavailable, expecting_vllm
from spo_lightning.rollouts.server_weights import WeightLink
from spo_lightning.rollouts.weight_group import TRANSFER_BACKEND

RETRY_INTERVAL = 0.5  # seconds
TELL_AFTER = 5.0  # seconds
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server's model can take.

    Attributes:
        max_model_len: most tokens of prompt and completion together.
        vocab_size: tokens that it has embeddings for.
    """

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ServerCheck:
    """What is asked of every server.

    Attributes:
        model_path: what the policy was loaded from.
        max_model_len: length that the server must take; ``None`` takes what it has.
        known_tokens: ids below are the tokenizer's; a server that is fit is told to sample no others.
        language_model_only: whether the policy is not all of its checkpoint (see ``PolicyParameters``).
        sizes: of the policy, by the names of ``MODEL_SIZES``.
    """

    model_path: str
    max_model_len: int | None
    known_tokens: int
    language_model_only: bool = False
    sizes: Mapping[str, int | None] = field(default_factory=dict)

    async def __call__(self, client: ServerClient) -> Limits:
        """Ask a server, and tell it which tokens there are.

        Raises:
            ServerUnavailable: it does not answer, or not as vLLM does.
            ServerRefused: it is not fit; lists every problem.
        """
        with expecting_vllm("what it tells of itself"):
            return await self._ask(client)

    async def _ask(self, client: ServerClient) -> Limits:
        served = await client.served_models()
        found = await client.describe()
        problems = []
        names = {PurePath(found["model"]).name, *(PurePath(name).name for name in served)}
        if PurePath(self.model_path).name not in names:
            problems.append(
                f"it serves {found['model']!r}, the policy is {self.model_path!r}: start it with that model, or with "
                f"--served-model-name {self.model_path} if it is a copy"
            )
        for name, size in found.get("sizes", {}).items():  # a worker of an earlier version tells none
            mine = self.sizes.get(name)
            if None not in (size, mine) and size != mine:
                problems.append(f"its model has {name} {size}, the policy {mine}: start it with the policy")
        if found["multimodal"] and self.language_model_only:
            problems.append(
                "it has loaded an encoder of images, which would be missing from what is pushed: start it with "
                "--language-model-only"
            )
        if found["logprobs_mode"] != "processed_logprobs":
            problems.append(
                f"its log-probabilities are {found['logprobs_mode']}, not those of the distribution that is sampled "
                "from: start it with --logprobs-mode processed_logprobs"
            )
        one, whole = await client.world_sizes()
        if whole > one:
            problems.append(
                f"it runs {whole // one} copies of the model, of which a push might reach one: start a server for each "
                "instead of one with --data-parallel-size"
            )
        if found["weight_transfer"] != TRANSFER_BACKEND:
            problems.append(
                f"its weight-transfer back end is {found['weight_transfer']!r}: start it with --weight-transfer-config "
                + repr(json.dumps({"backend": TRANSFER_BACKEND}))
            )
        if self.max_model_len is not None and found["max_model_len"] < self.max_model_len:
            problems.append(
                f"it takes {found['max_model_len']} tokens, {self.max_model_len} are needed: start it with "
                f"--max-model-len {self.max_model_len}"
            )
        if problems:
            raise ServerRefused("; ".join(problems))
        await client.hide_tokens(self.known_tokens)
        return Limits(self.max_model_len or found["max_model_len"], found["vocab_size"])

    async def wait(self, client: ServerClient, timeout: float) -> Limits:
        """Ask a server until it answers, and have it sample a token.

        Raises:
            ConfigError: it does not answer within ``timeout`` seconds, or is not fit.
        """
        begin, told = time.monotonic(), False
        while True:
            try:
                limits = await self(client)
                if await client.weight_version() != LOADING:
                    await client.try_out()
                return limits
            except ServerRefused as error:
                raise ConfigError(f"the server {client.url} is not fit for this run: {error}") from error
            except ServerUnavailable as error:
                waited = time.monotonic() - begin
                if waited > TELL_AFTER and not told:
                    told = True
                    log.warning("waiting for %s, up to %g s: %s", client.url, timeout, error)
                if waited > timeout:
                    raise ConfigError(
                        f"the server {client.url} did not answer within {timeout:g} s: {error}. Start it as "
                        "docs/servers.md says, or correct the engine's urls"
                    ) from error
            await asyncio.sleep(RETRY_INTERVAL)


async def connect(client: ServerClient, link: WeightLink) -> None:
    """Make sure at the start of a run that weights can be sent to a server.

    Raises:
        ConfigError: they cannot.
    """
    try:
        await link.connect(client)
    except (ServerRefused, ServerUnavailable) as error:
        raise ConfigError(
            f"weights cannot be sent to the server {client.url}: {error}. Let rank 0 and the server reach each other "
            "(transfer_address, transfer_port), or take another weight_transfer"
        ) from error
