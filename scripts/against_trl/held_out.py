"""Scores trained policies of either side on held-out problems, by one and the same evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from against_trl.settings import HELD_OUT

from spo_lightning.data.prompt_format import PromptFormatter
from spo_lightning.policy_files import load_tokenizer
from spo_lightning.protocols import EngineContext
from spo_lightning.rewards import MathVerifyReward
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.collector import RolloutCollector
from spo_lightning.types import Prompt, SamplingParams

SAMPLES = 4


def read_prompts(policy: str, path: str) -> list[Prompt]:
    """Problems of a JSONL file as the policy sees them."""
    tokenizer = load_tokenizer(policy, None)
    formatter = PromptFormatter(tokenizer)
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    texts = [formatter.render([{"role": "user", "content": row["problem"]}]) for row in rows]
    tokens = formatter.encode(texts)
    return [
        Prompt(i, row["id"], text, tuple(ids), row["answer"])
        for i, (row, text, ids) in enumerate(zip(rows, texts, tokens, strict=True))
    ]


def held_out(policy: str) -> float:
    """Share of right answers to held-out problems: 4 samples each at temperature 1, for every policy the same numbers.

    Args:
        policy: folder.
    """
    prompts = [prompt for prompt in read_prompts(policy, HELD_OUT) for _ in range(SAMPLES)]
    tokenizer = load_tokenizer(policy, None)
    engine = TransformersEngine()
    engine.start(EngineContext(policy, tokenizer, "cpu", "float32", eos_token_ids=(tokenizer.eos_token_id,)))
    reward = MathVerifyReward()
    completions = RolloutCollector(engine, reward).generate(prompts, SamplingParams(max_tokens=48), range(len(prompts)))
    grades = reward.grade(
        [completion.text for completion in completions],
        [prompt.reference for prompt in prompts],
        [prompt.text for prompt in prompts],
    )
    engine.close()
    reward.close()
    return sum(grade.value or 0.0 for grade in grades) / len(grades)
