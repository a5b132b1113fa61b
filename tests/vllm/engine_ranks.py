"""What one rank of two does with a vLLM engine and DDP alone, without a trainer; see ``fit_ranks.py``."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts.vllm_engine import VLLMEngine

from engine_runs import PROMPTS, TOKENIZER, assert_teacher_forced, request, run


def generate_and_train(folder: str, ranks_per_engine: int) -> None:
    """Rollouts, a DDP step on what was rolled out, pushes, close, collectives after it; twice with an engine each."""
    rank = dist.get_rank()
    engine = VLLMEngine(kv_cache_memory_bytes=64 << 20, tensor_parallel_size=ranks_per_engine)
    assert engine.ranks_per_engine == ranks_per_engine
    context = EngineContext(folder, TOKENIZER, "cpu", "float32", (), rank=rank, world_size=2)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ddp = DistributedDataParallel(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    share = rank if ranks_per_engine == 1 else 0  # ranks of one engine ask the same
    for life in range(2 // ranks_per_engine):
        engine.start(context)
        for version in range(2):
            engine.update_weights(policy.named_parameters(), version)
            count = 3 + 2 * share  # engines of their own need not step in step
            asked = [request(i, PROMPTS[i], 10 * share + i, max_tokens=10 + 5 * share) for i in range(count)]
            done = run(engine, asked)
            for completion in done.values():
                assert completion.policy_versions.eq(version).all()
                assert_teacher_forced(policy, completion)
            together: list[list[int]] = [[], []]
            dist.all_gather_object(together, done[0].token_ids.tolist())
            assert (together[0] == together[1]) == (ranks_per_engine == 2)
            ids = torch.cat([torch.tensor(done[0].prompt_token_ids), done[0].token_ids])[None]
            ddp(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.close()
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        assert total.item() == 3, f"life {life}"
