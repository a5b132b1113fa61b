r"""Make the quickstart's data and policy: additions of graded difficulty, and a small model that knows them but errs.

The policy is a Qwen3 architecture of under a million parameters on single characters. It is trained from scratch on
worked column additions such as::

    <|user|>57+86=?<|assistant|>7+6=13 5+8+1=14 \boxed{143}<|end|>

The working is always right. The final answer gets a wrong first digit in a known share of the training examples, larger
for harder levels. The model therefore learns to add *and* to err at that rate, which gives every level its own success
probability at the start of reinforcement learning, from nearly always to nearly never.

Usage, from the root of the repository (five to ten minutes on one core)::

    python scripts/make_quickstart.py                # data, tokenizer and policy into configs/quickstart
    python scripts/make_quickstart.py --data_only    # only the JSONL files

The data depend on ``--seed`` alone and are byte-identical everywhere. The weights depend on it too, but floating point
sums differ between machines and numbers of threads: a remade policy equals the shipped one in behaviour, not in bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Row = dict[str, str | int]
Example = tuple[list[int], list[int]]  # token ids, and labels with NOT_LEARNED where nothing is to be learned

PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"
BOX = "\\boxed{"
CHARACTERS = "0123456789+=? }"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}<|assistant|>{{ message['content'] }}<|end|>"
    "{%- else -%}<|user|>{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
NOT_LEARNED = -100


@dataclass(frozen=True)
class Level:
    """One grade of difficulty.

    Attributes:
        digits: of each of the two numbers.
        carries: fewest and most columns that carry, both inclusive.
        corruption: share of warm-start examples whose final answer has a wrong first digit.
    """

    digits: int
    carries: tuple[int, int]
    corruption: float


LEVELS: dict[int, Level] = {
    1: Level(digits=2, carries=(0, 0), corruption=0.15),
    2: Level(digits=2, carries=(1, 2), corruption=0.35),
    3: Level(digits=3, carries=(0, 1), corruption=0.55),
    4: Level(digits=3, carries=(2, 3), corruption=0.70),
    5: Level(digits=4, carries=(0, 2), corruption=0.85),
    6: Level(digits=4, carries=(3, 4), corruption=0.95),
}
ROWS_PER_LEVEL = {"test": 40, "val": 16, "train": 160}  # in this order, so that more training rows keep the others


def columns(a: int, b: int) -> Iterator[tuple[int, int, int]]:
    """Yield (digit of a, digit of b, carry into the column) from the ones upwards."""
    carry = 0
    while a or b:
        yield a % 10, b % 10, carry
        carry = (a % 10 + b % 10 + carry) // 10
        a, b = a // 10, b // 10


def count_carries(a: int, b: int) -> int:
    """Columns of ``a + b`` that carry into the next."""
    return sum(x + y + carry > 9 for x, y, carry in columns(a, b))


def draw_pair(level: Level, rng: random.Random) -> tuple[int, int]:
    """Draw two numbers that fit the level, each such pair equally likely."""
    low, high = 10 ** (level.digits - 1), 10**level.digits - 1
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if level.carries[0] <= count_carries(a, b) <= level.carries[1]:
            return a, b


def problem_text(a: int, b: int) -> str:
    """Word the problem as the data files and the model see it."""
    return f"{a}+{b}=?"


def worked_sum(a: int, b: int, answer: int) -> str:
    """Work the columns of ``a + b`` and put ``answer`` in the box, right or not."""
    steps = []
    for x, y, carry in columns(a, b):
        steps.append(f"{x}+{y}+1={x + y + 1}" if carry else f"{x}+{y}={x + y}")
    return " ".join(steps) + f" {BOX}{answer}}}"


def corrupt(answer: int, rng: random.Random) -> int:
    """Replace the first digit by another that is not 0."""
    digits = str(answer)
    wrong = rng.choice([d for d in "123456789" if d != digits[0]])
    return int(wrong + digits[1:])


def make_splits(seed: int) -> dict[str, list[Row]]:
    """Draw the problems of every split; no sum occurs twice, in either order of its numbers."""
    rng = random.Random(seed)
    taken: set[frozenset[int]] = set()
    splits: dict[str, list[Row]] = {}
    for split, rows_per_level in ROWS_PER_LEVEL.items():
        rows: list[Row] = []
        for number, level in LEVELS.items():
            while len(rows) < number * rows_per_level:
                a, b = draw_pair(level, rng)
                if frozenset((a, b)) not in taken:
                    taken.add(frozenset((a, b)))
                    rows.append({"problem": problem_text(a, b), "answer": str(a + b), "level": number})
        rng.shuffle(rows)
        splits[split] = [{"id": f"{split}-{i:04d}", **row} for i, row in enumerate(rows)]
    return splits


def to_jsonl(rows: Iterable[Row]) -> str:
    """Write rows as JSON, one a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def operands(row: Row) -> frozenset[int]:
    """The two numbers of a problem without their order."""
    return frozenset(int(number) for number in re.findall(r"\d+", str(row["problem"])))


def make_tokenizer(
    words: Sequence[str] = (BOX,), characters: str = CHARACTERS, model_max_length: int = 128
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of single characters, with each of ``words`` as one ordinary token, and a chat template."""
    special = [PAD, UNKNOWN, USER, ASSISTANT, END]
    vocabulary = {token: i for i, token in enumerate([*special, *words, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=model_max_length,
    )


def make_policy(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build the untrained policy."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=tokenizer.model_max_length,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def warm_start_batch(
    tokenizer: PreTrainedTokenizerFast, held_out: set[frozenset[int]], size: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Draw worked sums, levels equally likely, answers corrupted at the level's rate.

    Returns:
        Token ids (N, T) int64, padded on the right, and labels (N, T) int64, ``NOT_LEARNED`` on prompt and padding.
    """
    sequences: list[Example] = []
    while len(sequences) < size:
        level = rng.choice(list(LEVELS.values()))
        a, b = draw_pair(level, rng)
        if frozenset((a, b)) in held_out:
            continue
        answer = corrupt(a + b, rng) if rng.random() < level.corruption else a + b
        prompt = tokenizer.encode(f"{USER}{problem_text(a, b)}{ASSISTANT}")
        completion = tokenizer.encode(f"{worked_sum(a, b, answer)}{END}")
        sequences.append((prompt + completion, [NOT_LEARNED] * len(prompt) + completion))
    return pad_batch(sequences, int(tokenizer.pad_token_id))


def pad_batch(sequences: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Put examples into token ids (N, T) int64, padded on the right, and labels (N, T) int64."""
    longest = max(len(ids) for ids, _ in sequences)
    token_ids = torch.full((len(sequences), longest), pad_id)
    labels = torch.full((len(sequences), longest), NOT_LEARNED)
    for row, (ids, targets) in enumerate(sequences):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
    return token_ids, labels


def warm_start(policy: Qwen3ForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], args: argparse.Namespace) -> float:
    """Train the policy and return the mean loss of the last 50 steps, in nats a token.

    Args:
        policy: changed in place.
        batches: endless; token ids and labels as from :func:`pad_batch`.
        args: ``steps``, ``warmup_steps`` and ``lr`` are used.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def lr_factor(step: int) -> float:
        progress = max(0.0, (step - args.warmup_steps) / (args.steps - args.warmup_steps))
        return min(1.0, (step + 1) / args.warmup_steps) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    policy.train()
    losses: list[float] = []
    for step in range(args.steps):
        token_ids, labels = next(batches)
        # Right padding follows every learned token, so causal attention needs no mask.
        loss = policy(input_ids=token_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:5d}  loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def measure_success(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], samples: int, max_tokens: int = 56
) -> Tensor:
    """Sample completions at temperature 1 and grade them by the text of the box.

    Returns:
        (M, samples) bool, True where the boxed answer is right.
    """
    policy.eval()
    success = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        prompts = [f"{USER}{row['problem']}{ASSISTANT}" for row in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        output = policy.generate(
            **inputs, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=max_tokens, num_return_sequences=samples
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [f"{BOX}{part[i // samples]['answer']}}}" in text for i, text in enumerate(texts)]
        success.append(torch.tensor(right).view(len(part), samples))
    return torch.cat(success)


def report(rows: Sequence[Row], success: Tensor) -> str:
    """Put success by level and the spread over prompts into words. ``success`` is (M, samples) bool."""
    rate = success.double().mean(dim=1)
    levels = torch.tensor([int(row["level"]) for row in rows])
    lines = [f"mean success {rate.mean():.3f}"]
    for number, level in LEVELS.items():
        lines.append(f"  level {number}: {rate[levels == number].mean():.3f} (meant {1 - level.corruption:.2f})")
    counts = torch.bincount(success.sum(dim=1), minlength=success.shape[1] + 1).tolist()
    lines.append(f"prompts with 0, 1, ..., {success.shape[1]} successes of {success.shape[1]}: {counts}")
    return "\n".join(lines)


def parse_args(description: str, folder: str, steps: int, batch_size: int, lr: float) -> argparse.Namespace:
    """Read the command line. What is given, ``folder`` under configs, is the default."""
    parser = argparse.ArgumentParser(description=description)
    default_output = Path(__file__).resolve().parents[1] / "configs" / folder
    parser.add_argument("--output", type=Path, default=default_output, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of problems, errors, initial weights and sampling")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps of the warm start")
    parser.add_argument("--warmup_steps", type=int, default=50, help="steps of rising learning rate")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="examples a step")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more are seldom faster at this size")
    parser.add_argument("--data_only", action="store_true", help="write the JSONL files and stop")
    return parser.parse_args()


def write_splits(splits: dict[str, list[Row]], folder: Path) -> None:
    """Write ``train.jsonl``, ``val.jsonl`` and ``test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text(to_jsonl(rows), encoding="utf-8", newline="\n")


def write_policy(
    tokenizer: PreTrainedTokenizerFast, batches: Iterator[tuple[Tensor, Tensor]], args: argparse.Namespace
) -> PreTrainedModel:
    """Train a policy from scratch, write it to the folder ``policy`` in bfloat16, and return it as read from there."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    policy = make_policy(tokenizer)
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    started = time.perf_counter()
    loss = warm_start(policy, batches, args)
    print(f"warm start: {args.steps} steps, {time.perf_counter() - started:.0f} s, loss {loss:.4f}", flush=True)
    folder = args.output / "policy"
    tokenizer.save_pretrained(folder)
    policy.to(torch.bfloat16).save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    """Write ``train.jsonl``, ``val.jsonl``, ``test.jsonl`` and the folder ``policy``."""
    args = parse_args("Make the quickstart's data and policy.", "quickstart", steps=700, batch_size=64, lr=3e-3)
    splits = make_splits(args.seed)
    write_splits(splits, args.output)
    if args.data_only:
        return
    tokenizer = make_tokenizer()
    held_out = {operands(row) for split in ("val", "test") for row in splits[split]}
    rng = random.Random(args.seed + 1)
    batches = (warm_start_batch(tokenizer, held_out, args.batch_size, rng) for _ in itertools.count())
    saved = write_policy(tokenizer, batches, args)
    rows = splits["test"]
    print("on test.jsonl, " + report(rows, measure_success(saved, tokenizer, rows, samples=8)))


if __name__ == "__main__":
    main()
