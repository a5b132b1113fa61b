"""The tool quickstart's shipped data, tokenizer and policy, and the functions that made them."""

from __future__ import annotations

import json
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo_lightning.errors import ConfigError
from spo_lightning.tools import CodeTags, PythonInterpreter

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart_tools"
SPLITS = {"train": 960, "val": 96, "test": 240}
TAGS = ["\\boxed{", "<code>", "</code>", "<interpreter>", "</interpreter>"]
LEVELS = range(1, 7)

sys.path.insert(0, str(ROOT / "scripts"))
script: Any = import_module("make_quickstart_tools")


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def power_by_multiplication(a: int, b: int, m: int) -> int:
    value = 1
    for _ in range(b):
        value = value * a % m
    return value


def greatest_divisor(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def pyramid(n: int) -> int:
    return n * (n + 1) * (2 * n + 1) // 6


WORKED = {
    1: (r"\d{3}\*\d{3}", lambda a, b: sum(a for _ in range(b))),
    2: (r"\d{6} mod \d{3}", lambda a, m: a - a // m * m),
    3: (r"\(\d{3}\*\d{3}\+\d{2}\) mod \d{3}", lambda a, b, c, m: divmod(a * b + c, m)[1]),
    4: (r"\d{3}\^\d{2} mod \d{3}", power_by_multiplication),
    5: (r"gcd\(\d{4,5},\d{4,5}\)", greatest_divisor),
    6: (r"sum of k\*k, k=\d{3}\.\.\d{3}", lambda first, last: pyramid(last) - pyramid(first - 1)),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / "policy", local_files_only=True)


@pytest.fixture(scope="module")
def policy() -> Any:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "policy", dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[PythonInterpreter]:
    tool = PythonInterpreter()
    try:
        tool.start()
    except ConfigError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    yield tool
    tool.close()


def draw(count: int = 20) -> list[tuple[int, Any]]:
    """Problems of every level."""
    rng = random.Random(0)
    return [(number, level.draw(rng)) for number, level in script.LEVELS.items() for _ in range(count)]


def test_files_are_small_and_complete() -> None:
    files = [path for path in QUICKSTART.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {"train.jsonl", "val.jsonl", "test.jsonl", "model.safetensors"} <= {path.name for path in files}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_levels_are_balanced(split: str) -> None:
    rows = read(split)
    assert len(rows) == SPLITS[split]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        form, work = WORKED[row["level"]]
        assert re.fullmatch(form, row["problem"])
        assert row["answer"] == str(work(*numbers(row["problem"])))
    assert Counter(row["level"] for row in rows) == dict.fromkeys(LEVELS, len(rows) // len(LEVELS))


def test_no_two_problems_have_the_same_numbers() -> None:
    problems = [frozenset(numbers(row["problem"])) for split in SPLITS for row in read(split)]
    assert len(set(problems)) == sum(SPLITS.values())


def test_another_seed_gives_other_problems() -> None:
    assert script.make_splits(seed=1)["val"] != script.make_splits(seed=0)["val"]


def test_data_are_remade_byte_for_byte_without_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_quickstart_tools", "--data_only", "--output", str(tmp_path)])
    script.main()
    assert {path.name for path in tmp_path.iterdir()} == {f"{split}.jsonl" for split in SPLITS}
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (QUICKSTART / f"{split}.jsonl").read_bytes()


def test_shipped_tokenizer_is_the_scripts(tokenizer: Any) -> None:
    made = script.make_tokenizer(script.WORDS, script.CHARACTERS, script.MODEL_MAX_LENGTH)
    assert made.get_vocab() == tokenizer.get_vocab()


def test_tags_are_one_token_each_and_stay_in_the_text(tokenizer: Any) -> None:
    text = "".join(TAGS)
    ids = tokenizer.encode(text)
    assert len(set(ids)) == len(ids) == len(TAGS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_whatever_an_interpreter_prints_can_be_encoded(tokenizer: Any) -> None:
    text = string.ascii_letters + string.digits + string.punctuation + " \n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.encode("é\t") == [tokenizer.unk_token_id] * 2


def test_prompts_tokenize_without_loss(tokenizer: Any) -> None:
    for row in (row for split in SPLITS for row in read(split)):
        chat = [{"role": "user", "content": row["problem"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == f"<|user|>{row['problem']}<|assistant|>"
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 32  # data.max_prompt_tokens


def test_programs_do_what_they_are_drawn_for(interpreter: PythonInterpreter) -> None:
    for level, problem in draw():
        answer = str(WORKED[level][1](*numbers(problem.text)))
        assert str(problem.answer) == answer
        right, wrong = (interpreter.call({"code": code}) for code in (problem.program, problem.wrong))
        assert (right.text.strip(), right.failed, wrong.failed) == (answer, False, False)
        assert wrong.text.strip() != answer
        failing = interpreter.call({"code": problem.failing})
        assert failing.failed
        assert "Error" in failing.text


def test_results_of_the_warm_start_are_what_the_sandbox_shows(interpreter: PythonInterpreter) -> None:
    own = PythonInterpreter(script.OwnPrograms())
    rng = random.Random(1)
    for _, problem in draw(3):
        for code in (problem.program, problem.wrong, script.printing(problem.program, rng), problem.failing):
            assert own.call({"code": code}) == interpreter.call({"code": code})


def test_half_of_the_programs_print() -> None:
    rng = random.Random(0)
    program = "import math\nmath.gcd(4,6)"
    drawn = Counter(script.printing(program, rng) for _ in range(400))
    assert set(drawn) == {program, "import math\nprint(math.gcd(4,6))"}
    assert 160 <= drawn[program] <= 240


def test_examples_in_every_way_that_there_is(tokenizer: Any) -> None:
    problem = script.Problem("6*7", 42, "6*7", "6+7", "print 6*7")

    def text(*route: Any) -> str:
        parts = list(script.dialogue(problem, script.Route(*route), tokenizer, random.Random(3)))
        assert [learned for _, learned in parts] == [True, *[False, True] * (len(parts) // 2)]
        return re.sub(r"print\((.*?)\)(?=</code>)", r"\1", "".join(part for part, _ in parts))

    error = re.escape(PythonInterpreter(script.OwnPrograms()).call({"code": "print 6*7"}).text)
    assert "SyntaxError" in error
    failed = rf"<code>print 6\*7</code>\n<interpreter>\n{error}\n</interpreter>\n"
    right = r"<code>6\*7</code>\n<interpreter>\n42\n+</interpreter>\n"
    wrong = r"<code>6\+7</code>\n<interpreter>\n13\n+</interpreter>\n"
    end = r"\}<\|end\|>"
    assert re.fullmatch(rf"{right}\\boxed\{{42{end}", text(("program",), "result"))
    assert re.fullmatch(rf"{failed}{right}\\boxed\{{42{end}", text(("failing", "program"), "result"))
    assert re.fullmatch(rf"\\boxed\{{42{end}", text((), "guess"))
    assert re.fullmatch(rf"{wrong}\\boxed\{{13{end}", text(("wrong",), "result"))
    assert re.fullmatch(rf"{failed}\\boxed\{{42{end}", text(("failing",), "guess"))
    assert re.fullmatch(rf"{right}\\boxed\{{[1235-9]2{end}", text(("program",), "slip"))


@pytest.mark.parametrize("level", LEVELS)
def test_shares_of_routes(level: int) -> None:
    rng = random.Random(0)
    drawn = Counter(script.draw_route(script.LEVELS[level], rng) for _ in range(2000))
    right = sum(drawn[route] for route in script.RIGHT_ROUTES) / 2000
    assert right == pytest.approx({1: 0.65, 2: 0.55, 3: 0.40, 4: 0.30, 5: 0.20, 6: 0.10}[level], abs=0.04)
    assert len(drawn) == 6


def test_warm_start_learns_what_the_policy_writes_and_calls_are_read_as_written(tokenizer: Any) -> None:
    rng = random.Random(0)
    interpreter = PythonInterpreter(script.OwnPrograms())
    calls = 0
    for _ in range(200):
        ids, labels = script.draw_example(tokenizer, set(), rng)
        assert tokenizer.unk_token_id not in ids
        assert all(label in (token, script.NOT_LEARNED) for token, label in zip(ids, labels, strict=True))
        prompt, _, rest = tokenizer.decode(ids).partition("<|assistant|>")
        turns = re.split(r"(\n<interpreter>\n.*?\n</interpreter>\n)", rest, flags=re.DOTALL)
        learned = [label for label in labels if label != script.NOT_LEARNED]
        assert tokenizer.decode(learned) == "".join(turns[::2])
        assert tokenizer.decode(ids[: labels.index(learned[0])]) == prompt + "<|assistant|>"
        for turn, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            (call,) = CodeTags().calls(turn, [interpreter])
            assert script.shown(interpreter.call(call.arguments).text, tokenizer) == answer
            calls += 1
    assert calls >= 150


def test_held_out_problems_are_not_learned(tokenizer: Any) -> None:
    (_, first), (_, second) = draw()[:2]
    ids, _ = script.draw_example(tokenizer, {frozenset(numbers(first.text))}, FirstLevel(0))
    assert tokenizer.decode(ids).partition("<|assistant|>")[0] == f"<|user|>{second.text}"


class FirstLevel(random.Random):
    """Takes the first of what there is to choose from."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


def test_batches_hold_examples_of_similar_length(tokenizer: Any) -> None:
    batches = script.warm_start_batches(tokenizer, set(), size=16, seed=0)
    pool = [next(batches) for _ in range(script.POOL)]
    padded = sum(int((ids == tokenizer.pad_token_id).sum()) for ids, _ in pool)
    assert padded < 0.15 * sum(ids.numel() for ids, _ in pool)
    widths = [ids.shape[1] for ids, _ in pool]
    assert widths != sorted(widths)
    for ids, labels in pool:
        assert ids.shape == labels.shape == (16, ids.shape[1])
        assert (labels[ids == tokenizer.pad_token_id] == script.NOT_LEARNED).all()


def test_policy_is_small_and_agrees_with_the_tokenizer(policy: Any, tokenizer: Any) -> None:
    assert policy.config.model_type == "qwen3"
    assert 500_000 < sum(p.numel() for p in policy.parameters()) < 1_200_000
    assert policy.config.vocab_size == len(tokenizer)
    assert policy.config.max_position_embeddings == tokenizer.model_max_length == 1024
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == tokenizer.pad_token_id


def test_success_falls_with_the_level_and_is_nought_in_the_head(
    policy: Any, tokenizer: Any, interpreter: PythonInterpreter
) -> None:
    torch.manual_seed(0)
    rows = sorted(read("test"), key=lambda row: row["level"])
    success = script.measure_success(policy, tokenizer, rows, 1, interpreter).view(len(LEVELS), 40)
    for level, rate in zip(LEVELS, success.double().mean(dim=1).tolist(), strict=True):
        assert rate == pytest.approx(script.LEVELS[level].right, abs=0.22)
    head = script.measure_success(policy, tokenizer, rows, 1, None, opening="\\boxed{")
    assert head.double().mean() <= 0.02
