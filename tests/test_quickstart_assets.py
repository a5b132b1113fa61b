"""The quickstart's shipped data, tokenizer and policy, and the functions that made them."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
SPLITS = {"train": 960, "val": 96, "test": 240}
START_SUCCESS = {1: 0.85, 2: 0.65, 3: 0.45, 4: 0.30, 5: 0.15, 6: 0.05}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_quickstart", ROOT / "scripts" / "make_quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_quickstart"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(problem: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\+(\d+)=\?", problem)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / "policy", local_files_only=True)


@pytest.fixture(scope="module")
def policy() -> Any:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "policy", dtype=torch.float32, local_files_only=True)


def test_files_are_small_and_complete() -> None:
    files = [path for path in QUICKSTART.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {"train.jsonl", "val.jsonl", "test.jsonl", "model.safetensors"} <= {path.name for path in files}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_the_sums_and_levels_are_balanced(split: str) -> None:
    rows = read(split)
    assert len(rows) == SPLITS[split]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["answer"] == str(sum(numbers(row["problem"])))
    levels = [row["level"] for row in rows]
    assert {levels.count(level) for level in START_SUCCESS} == {len(rows) // len(START_SUCCESS)}


def test_no_sum_occurs_twice_in_either_order() -> None:
    pairs = [frozenset(numbers(row["problem"])) for split in SPLITS for row in read(split)]
    assert len(set(pairs)) == sum(SPLITS.values())


@pytest.mark.parametrize("split", SPLITS)
def test_data_are_remade_byte_for_byte(split: str) -> None:
    shipped = (QUICKSTART / f"{split}.jsonl").read_bytes()
    assert script.to_jsonl(script.make_splits(seed=0)[split]).encode() == shipped


def test_another_seed_gives_other_problems() -> None:
    assert script.make_splits(seed=1)["val"] != script.make_splits(seed=0)["val"]


@pytest.mark.parametrize(
    ("a", "b", "carries"),
    [(12, 34, 0), (57, 86, 2), (59, 13, 1), (999, 1, 3), (905, 95, 3), (7978, 1308, 2), (4728, 5271, 0)],
)
def test_carries_counted_by_hand(a: int, b: int, carries: int) -> None:
    assert script.count_carries(a, b) == carries


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (12, 34, r"2+4=6 1+3=4 \boxed{46}"),
        (57, 86, r"7+6=13 5+8+1=14 \boxed{143}"),
        (4728, 1936, r"8+6=14 2+3+1=6 7+9=16 4+1+1=6 \boxed{6664}"),
    ],
)
def test_sums_worked_by_hand(a: int, b: int, text: str) -> None:
    assert script.worked_sum(a, b, a + b) == text


def test_corruption_changes_the_first_digit_only_and_evenly() -> None:
    rng = random.Random(0)
    wrong = [str(script.corrupt(1234, rng)) for _ in range(800)]
    assert {answer[1:] for answer in wrong} == {"234"}
    assert {answer[0] for answer in wrong} == set("23456789")
    assert all(60 <= [answer[0] for answer in wrong].count(digit) <= 140 for digit in "23456789")


def test_warm_start_labels_cover_the_completion_only(tokenizer: Any) -> None:
    token_ids, labels = script.warm_start_batch(tokenizer, set(), size=4, rng=random.Random(0))
    for ids, label in zip(token_ids, labels, strict=True):
        learned = label != script.NOT_LEARNED
        assert torch.equal(label[learned], ids[learned])
        prompt, completion = tokenizer.decode(ids[: int(learned.nonzero()[0])]), tokenizer.decode(label[learned])
        a, b = numbers(prompt.removeprefix("<|user|>").removesuffix("<|assistant|>"))
        working = script.worked_sum(a, b, 0).removesuffix("0}")
        assert re.fullmatch(re.escape(working) + r"\d+\}<\|end\|>", completion)


def test_prompts_tokenize_without_loss(tokenizer: Any) -> None:
    for row in (row for split in SPLITS for row in read(split)):
        chat = [{"role": "user", "content": row["problem"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == f"<|user|>{row['problem']}<|assistant|>"
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(row["problem"]) + 2


def test_completions_survive_the_tokenizer(tokenizer: Any) -> None:
    text = r"7+6=13 5+8+1=14 \boxed{143}"
    ids = tokenizer.encode(text + "<|end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert ids.count(tokenizer.convert_tokens_to_ids("\\boxed{")) == 1
    assert len(ids) == len(text) + 1 - len("boxed{")


def test_policy_is_small_and_agrees_with_the_tokenizer(policy: Any, tokenizer: Any) -> None:
    assert policy.config.model_type == "qwen3"
    assert 500_000 < sum(p.numel() for p in policy.parameters()) < 1_000_000
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.config.vocab_size == len(tokenizer)
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == tokenizer.pad_token_id


def test_working_is_right_and_success_falls_with_the_level(policy: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    rows = [row for level in START_SUCCESS for row in read("test") if row["level"] == level]
    chats = [[{"role": "user", "content": row["problem"]}] for row in rows]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    prompt_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    output = policy.generate(input_ids=prompt_ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=48)
    texts = tokenizer.batch_decode(output[:, prompt_ids.shape[1] :], skip_special_tokens=True)

    right_working, right_answer = 0, dict.fromkeys(START_SUCCESS, 0)
    for row, text in zip(rows, texts, strict=True):
        working = script.worked_sum(*numbers(row["problem"]), 0).removesuffix("0}")
        right_working += bool(re.fullmatch(re.escape(working) + r"\d+\}", text))
        right_answer[row["level"]] += text.endswith(f"\\boxed{{{row['answer']}}}")
    assert right_working >= 0.95 * len(rows)
    for level, expected in START_SUCCESS.items():
        assert right_answer[level] / 40 == pytest.approx(expected, abs=0.22)
