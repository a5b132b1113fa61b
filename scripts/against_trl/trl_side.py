"""TRL's side of the comparison: one training run by its GRPOTrainer, timed. Runs in TRL's own environment.

usage: trl_side.py JOB.json, of which ``bench_against_trl.py`` writes the JSON file
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from spo_lightning.rewards import MathVerifyReward  # noqa: E402 (the very class that our side grades with)


class TimedTrainer(GRPOTrainer):
    """TRL's trainer with a clock around its stages; it changes nothing else.

    Attributes:
        seconds: by stage, since they were last cleared.
        end_of_inputs: when the inputs of the present optimiser step were ready.
    """

    def __init__(self, **arguments: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.end_of_inputs = 0.0
        super().__init__(**arguments)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        self.end_of_inputs = time.perf_counter()
        return inputs

    def _generate(self, *arguments: Any, **named: Any) -> Any:
        with self._timed("rollout"):
            return super()._generate(*arguments, **named)

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Any:
        with self._timed("reward"):
            return super()._calculate_rewards(*arguments, **named)

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
        if named.get("compute_entropy"):  # the pass with gradient, part of the update
            return super()._get_per_token_logps_and_entropies(*arguments, **named)
        with self._timed("score"):
            return super()._get_per_token_logps_and_entropies(*arguments, **named)


class Clock(TrainerCallback):
    """Notes at every end of an iteration when it was and how its time was spent.

    Args:
        steps: optimiser steps of an iteration.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.iterations: list[dict[str, Any]] = []
        self.trainer: TimedTrainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The update is everything from ready inputs to here: loss, gradient, clipping, optimizer."""
        self.trainer.seconds["update"] += time.perf_counter() - self.trainer.end_of_inputs
        if state.global_step % self.steps == 0:
            now = {"end": time.perf_counter(), "processor": time.process_time()}
            self.iterations.append({**now, "stages": dict(self.trainer.seconds)})
            self.trainer.seconds.clear()


def check_prompts(tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """Raise ValueError unless TRL's way to tokenize a prompt gives the ids that our side trains on."""
    found = tokenizer(text=[row["prompt"] for row in rows])["input_ids"]
    for row, ids in zip(rows, found, strict=True):
        if ids != row["token_ids"]:
            raise ValueError(f"prompt {row['prompt']!r} is {ids} to TRL and {row['token_ids']} to us; they must agree")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    check_prompts(tokenizer, job["prompts"])
    reward = MathVerifyReward()

    def correct(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [grade.value for grade in reward.grade(completions, answer, prompts)]

    clock = Clock(job["steps"])
    trainer = TimedTrainer(
        model=job["policy"],
        reward_funcs=correct,
        args=GRPOConfig(output_dir=job["folder"], **job["config"]),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "answer")} for row in job["prompts"]]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.train()
    reward.close()
    trainer.save_model(f"{job['folder']}/policy")
    logged = [record for record in trainer.state.log_history if "reward" in record]
    for iteration, record in zip(clock.iterations, logged, strict=True):
        iteration |= {"reward": record["reward"], "length": record["completions/mean_length"]}
    Path(job["output"]).write_text(json.dumps(clock.iterations), encoding="utf-8")


if __name__ == "__main__":
    main()
