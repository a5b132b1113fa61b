"""What the tests of the vLLM engine share: tiny policies, requests, and log-probabilities by a full forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.types import Completion, RolloutRequest, SamplingParams

from tiny_models import make_char_tokenizer, make_model

SPEC = find_spec("vllm")  # without an origin: a folder such as this one, which is no package
NEEDS_VLLM = pytest.mark.skipif(
    SPEC is None or SPEC.origin is None,
    reason="vllm is not installed; scripts/setup_vllm_cpu.sh makes an environment that has it",
)
TOKENIZER = make_char_tokenizer()
KNOWN = len(TOKENIZER)
PROMPTS = [tuple(TOKENIZER.encode(text)) for text in ("12+34=", "7", "what is 3*(4+5)?", "a b c", "9-1=", "0" * 30)]
CACHE_BYTES = 64 << 20
TOLERANCE = 3e-5


def make_policy(folder: Path, **options: Any) -> PreTrainedModel:
    """vLLM's attention on a CPU takes heads of 32 channels or more; its vocabulary is larger than the tokenizer's."""
    shape = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "max_positions": 512, "vocab_size": KNOWN + 13}
    return make_model(folder, **{**shape, **options})


def start(folder: Path | str, eos: tuple[int, ...] = (), device: str = "cpu", **options: Any) -> VLLMEngine:
    engine = VLLMEngine(**{"kv_cache_memory_bytes": CACHE_BYTES, "max_num_seqs": 16, **options})
    engine.start(EngineContext(str(folder), TOKENIZER, device, "float32", eos))
    return engine


def request(
    number: int,
    prompt: tuple[int, ...] = PROMPTS[0],
    seed: int | None = None,
    partial: Completion | None = None,
    **sampling: Any,
) -> RolloutRequest:
    return RolloutRequest(
        number, prompt, SamplingParams(**{"max_tokens": 24, **sampling}), number if seed is None else seed, partial
    )


def run(engine: RolloutEngine, requests: Iterable[RolloutRequest] = ()) -> dict[int, Completion]:
    engine.submit(list(requests))
    done = {}
    while engine.num_open:
        done.update({c.request_id: c for c in engine.step()})
    return done


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, completion: Completion, sampling: SamplingParams) -> torch.Tensor:
    """Log-probabilities of a completion by one full forward in float64, and a naive filter token by token."""
    ids = torch.cat([torch.tensor(completion.prompt_token_ids), completion.token_ids])
    logits = model(input_ids=ids[None]).logits[0, len(completion.prompt_token_ids) - 1 : -1, :KNOWN].double()
    result = []
    for row, token in zip(logits / (sampling.temperature or 1.0), completion.token_ids.tolist(), strict=True):
        probs = row.softmax(-1)
        ranked = probs.argsort(descending=True).tolist()
        kept = ranked[: sampling.top_k] if sampling.top_k else ranked
        mass, nucleus, total = 0.0, [], probs[kept].sum().item()
        for candidate in kept:
            if mass >= sampling.top_p:
                break
            nucleus.append(candidate)
            mass += probs[candidate].item() / total
        assert token in nucleus
        result.append(probs[token].log() - probs[nucleus].sum().log())
    return torch.stack(result)


def assert_teacher_forced(
    model: PreTrainedModel, completion: Completion, sampling: SamplingParams | None = None
) -> None:
    expected = reference_logprobs(model, completion, sampling or SamplingParams())
    torch.testing.assert_close(completion.sampling_logprobs.double(), expected, atol=TOLERANCE, rtol=0)
