"""Policies and engines for the tests on real servers, and the teacher-forced check of what they return."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts.vllm_server import VLLMServerEngine
from spo_lightning.types import Completion, RolloutRequest, SamplingParams

from tiny_models import make_char_tokenizer, make_model

VOCABULARY = 64  # more than the 49 tokens of the tokenizer, as with padded vocabularies
KNOWN = 49
TOLERANCE = 3e-5  # float32 on both sides; the smallest error of stale weights is far above 0.01


class Policy:
    """A tiny model that changes from version to version, and remembers each."""

    def __init__(self, folder: Path, tied: bool, architecture: str = "qwen3") -> None:
        self.folder = folder
        self.tokenizer = make_char_tokenizer(folder)
        # heads of 32 channels: vLLM's attention on the CPU takes no fewer
        sizes: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "max_positions": 1024}
        self.model = make_model(folder, architecture, tied, vocab_size=VOCABULARY, **sizes)
        self.versions: dict[int, PreTrainedModel] = {0: copy.deepcopy(self.model)}

    @torch.no_grad()
    def change(self, version: int) -> None:
        torch.manual_seed(version)
        for parameter in {id(value): value for value in self.model.state_dict(keep_vars=True).values()}.values():
            parameter.add_(0.03 * torch.randn_like(parameter))
        self.versions[version] = copy.deepcopy(self.model)

    def push(self, engine: VLLMServerEngine, version: int) -> None:
        self.change(version)
        engine.update_weights(self.model.state_dict().items(), version)

    def context(self, rank: int = 0, eos: tuple[int, ...] = (), **changes: Any) -> EngineContext:
        return EngineContext(
            str(self.folder), self.tokenizer, "cpu", "float32", eos, rank=rank, world_size=rank + 1, **changes
        )


@torch.no_grad()
def logprob_error(
    policy: Policy,
    completion: Completion,
    adjust: Callable[[Tensor], Tensor] = lambda x: x,
    only: Tensor | slice = slice(None),
) -> float:
    """Largest difference to a forward pass over the whole completion with the weights of each token's version."""
    prompt = len(completion.prompt_token_ids)
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids.tolist()]])
    expected = torch.empty(len(completion.token_ids))
    for version in completion.policy_versions.unique().tolist():
        logits = policy.versions[version](ids).logits[0, prompt - 1 : -1, :KNOWN].double()
        logprobs = adjust(logits).log_softmax(-1).gather(-1, completion.token_ids[:, None])[:, 0].float()
        own = completion.policy_versions == version
        expected[own] = logprobs[own]
    return float((expected - completion.sampling_logprobs)[only].abs().max())


def ask(request_id: int, prompt: tuple[int, ...] = (2, 3, 4), tokens: int = 100, **rest: Any) -> RolloutRequest:
    seed = rest.pop("seed", request_id)
    partial = rest.pop("partial", None)
    return RolloutRequest(request_id, prompt, SamplingParams(max_tokens=tokens, **rest), seed, partial)


def long_prompt(last: int) -> tuple[int, ...]:
    """Longer than one block of the key-value cache, 128 tokens, so that requests share a cached prefix."""
    return (*(2 + i * i % 40 for i in range(140)), last)


def drain(engine: VLLMServerEngine, seconds: float = 60.0) -> list[Completion]:
    done: list[Completion] = []
    deadline = time.monotonic() + seconds
    while engine.num_open:
        assert time.monotonic() < deadline, f"{engine.num_open} requests are still open after {seconds} s"
        done += engine.step()
    return done


def wait_for_tokens(engine: VLLMServerEngine, count: int, seconds: float = 30.0, requests: int | None = None) -> None:
    """Until ``requests`` open requests, or all, have ``count`` tokens."""
    deadline = time.monotonic() + seconds
    while True:
        lengths = sorted((len(completion.token_ids) for completion in engine.partials()), reverse=True)
        if lengths[: requests or len(lengths)][-1] >= count:
            return
        assert time.monotonic() < deadline, f"no {count} tokens of {requests or 'all'} requests within {seconds} s"
        time.sleep(0.02)
