r"""Make the tool quickstart's data and policy: calculations too hard for a small model's head, and easy for Python.

The policy is the quickstart's: a Qwen3 architecture of under a million parameters on single characters, trained from
scratch. It learns to write a program, to read what the interpreter shows, and to box it::

    <|user|>83472 mod 613<|assistant|><code>83472%613</code>
    <interpreter>
    104
    </interpreter>
    \boxed{104}<|end|>

Only what the policy writes is learned; the interpreter's words are not. A share of the examples, larger for harder
levels, goes wrong in one of four ways (``OTHER_ROUTES``). The right answer is the target even where it is to be guessed
without the interpreter, so that how seldom such guesses are right is a property of the policy.

Usage, from the root of the repository (about ten minutes on one core)::

    python scripts/make_quickstart_tools.py                # data, tokenizer and policy into configs/quickstart_tools
    python scripts/make_quickstart_tools.py --data_only    # only the JSONL files

The data depend on ``--seed`` alone and are byte-identical everywhere. The weights depend on it too, but floating point
sums differ between machines and numbers of threads: a remade policy equals the shipped one in behaviour, not in bytes.
"""

from __future__ import annotations

import ast
import linecache
import math
import random
import string
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Literal

import torch
from make_quickstart import (
    ASSISTANT,
    BOX,
    END,
    NOT_LEARNED,
    ROWS_PER_LEVEL,
    USER,
    Example,
    Row,
    corrupt,
    make_tokenizer,
    operands,
    pad_batch,
    parse_args,
    write_policy,
    write_splits,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spo_lightning.rewards.extraction import last_boxed
from spo_lightning.tools import CodeTags, PythonInterpreter
from spo_lightning.tools.protocol import CodeRunner, Execution

WORDS = (BOX, "<code>", "</code>", "<interpreter>", "</interpreter>")
CHARACTERS = string.ascii_letters + string.punctuation + " \n" + string.digits  # what Python may print
MODEL_MAX_LENGTH = 1024
POOL = 8  # batches drawn and sorted by length together, so that one long example does not pad 15 short ones


@dataclass(frozen=True)
class Problem:
    """A calculation.

    Attributes:
        text: as the data files and the model see it.
        answer: worked out here, not by ``program``.
        program: its last line is an expression with the right value.
        wrong: likewise, with another value: a misread operator, range or precedence.
        failing: a program that raises an exception or cannot be parsed.
    """

    text: str
    answer: int
    program: str
    wrong: str
    failing: str


def number(digits: int, rng: random.Random) -> int:
    """Draw a number of so many digits, each equally likely."""
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def product(rng: random.Random) -> Problem:
    """``347*682``; Python 2's print fails."""
    a, b = number(3, rng), number(3, rng)
    return Problem(f"{a}*{b}", a * b, f"{a}*{b}", f"{a}+{b}", f"print {a}*{b}")


def remainder(rng: random.Random) -> Problem:
    """``83472 mod 613``; the operator of the quotient is wrong, and mod is no Python."""
    a, m = number(6, rng), number(3, rng)
    return Problem(f"{a} mod {m}", a % m, f"{a}%{m}", f"{a}//{m}", f"{a} mod {m}")


def mixed(rng: random.Random) -> Problem:
    """``(347*682+91) mod 613``; wrong without the brackets."""
    a, b, c, m = number(3, rng), number(3, rng), number(2, rng), number(3, rng)
    text = f"({a}*{b}+{c}) mod {m}"
    return Problem(text, (a * b + c) % m, f"({a}*{b}+{c})%{m}", f"{a}*{b}+{c}%{m}", text)


def power(rng: random.Random) -> Problem:
    """``347^23 mod 613``; in Python ``^`` is no power."""
    a, b, m = number(3, rng), number(2, rng), number(3, rng)
    return Problem(f"{a}^{b} mod {m}", pow(a, b, m), f"{a}**{b}%{m}", f"{a}^{b}%{m}", f"{a}^{b} mod {m}")


def common_divisor(rng: random.Random) -> Problem:
    """``gcd(84672,51840)``, of three digits; wrong is the least common multiple, and no import fails."""
    divisor = number(3, rng)
    a, b = divisor * number(2, rng), divisor * number(2, rng)
    call = f"({a},{b})"
    return Problem(
        f"gcd{call}", math.gcd(a, b), f"import math\nmath.gcd{call}", f"import math\nmath.lcm{call}", f"gcd{call}"
    )


def sum_of_squares(rng: random.Random) -> Problem:
    """``sum of k*k, k=123..456``; a range that leaves out its end is wrong, and dots are no range."""
    first, last = sorted((number(3, rng), number(3, rng)))
    answer = sum(k**2 for k in range(first, last + 1))
    program, wrong = (f"sum(k*k for k in range({first},{last}{end}))" for end in ("+1", ""))
    return Problem(f"sum of k*k, k={first}..{last}", answer, program, wrong, f"sum(k*k for k={first}..{last})")


@dataclass(frozen=True)
class Level:
    """One kind of problem.

    Attributes:
        draw: draws a problem.
        right: share of warm-start examples that end with the right answer from the interpreter.
    """

    draw: Callable[[random.Random], Problem]
    right: float


LEVELS: dict[int, Level] = {
    1: Level(product, right=0.65),
    2: Level(remainder, right=0.55),
    3: Level(mixed, right=0.40),
    4: Level(power, right=0.30),
    5: Level(common_divisor, right=0.20),
    6: Level(sum_of_squares, right=0.10),
}


@dataclass(frozen=True)
class Route:
    """What happens in a warm-start example.

    Attributes:
        programs: the problem's programs that are written, one after the other.
        box: what is boxed: the last "result" shown, a "guess", or the answer with a "slip" in its first digit.
    """

    programs: tuple[Literal["program", "wrong", "failing"], ...]
    box: Literal["result", "guess", "slip"]


RIGHT_ROUTES = {Route(("program",), "result"): 0.8, Route(("failing", "program"), "result"): 0.2}
OTHER_ROUTES = {
    Route((), "guess"): 0.3,
    Route(("wrong",), "result"): 0.3,
    Route(("failing",), "guess"): 0.2,
    Route(("program",), "slip"): 0.2,
}


def draw_route(level: Level, rng: random.Random) -> Route:
    """Draw what happens, at the level's share of right answers."""
    routes = RIGHT_ROUTES if rng.random() < level.right else OTHER_ROUTES
    return rng.choices(list(routes), list(routes.values()))[0]


def make_splits(seed: int) -> dict[str, list[Row]]:
    """Draw the problems of every split; no two have the same numbers, in whatever order."""
    rng = random.Random(seed)
    taken: set[frozenset[int]] = set()
    splits: dict[str, list[Row]] = {}
    for split, rows_per_level in ROWS_PER_LEVEL.items():
        rows: list[Row] = []
        for level_number, level in LEVELS.items():
            while len(rows) < level_number * rows_per_level:
                problem = level.draw(rng)
                row: Row = {"problem": problem.text, "answer": str(problem.answer), "level": level_number}
                if operands(row) not in taken:
                    taken.add(operands(row))
                    rows.append(row)
        rng.shuffle(rows)
        splits[split] = [{"id": f"{split}-{i:04d}", **row} for i, row in enumerate(rows)]
    return splits


class OwnPrograms(CodeRunner):
    """Runs the programs of this file, which need no guarding, in this process."""

    def run(self, code: str) -> Execution:
        """Run a program and show the value of its last expression."""
        printed = StringIO()
        try:
            with redirect_stdout(printed):
                value = notebook_value(code)
        except (NameError, SyntaxError) as error:
            return Execution(printed.getvalue(), error_text(error, code), None, "error")
        return Execution(printed.getvalue(), "", None if value is None else repr(value), "ok")


def notebook_value(code: str) -> object:
    """Run all statements, the last of them an expression, and return its value."""
    tree = ast.parse(code, "<code>")
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    namespace: dict[str, object] = {}
    exec(compile(tree, "<code>", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "<code>", "eval"), namespace)


def error_text(error: Exception, code: str) -> str:
    """What Python prints for an uncaught exception of a program, this file's frames left out."""
    linecache.cache["<code>"] = (len(code), None, f"{code}\n".splitlines(keepends=True), "<code>")
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != "<code>":
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame))


def shown(result: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """What is put behind a program for a result."""
    return "".join(piece.text for piece in CodeTags().answer([result], tokenizer, ended=False))


def printing(program: str, rng: random.Random) -> str:
    """Print the value of the last line, in half of the cases."""
    *head, last = program.split("\n")
    return "\n".join([*head, f"print({last})"]) if rng.random() < 0.5 else program


def dialogue(
    problem: Problem, route: Route, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a warm-start example behind the prompt, and whether the policy is to learn them."""
    interpreter = PythonInterpreter(OwnPrograms())
    result = ""
    for kind in route.programs:
        code = problem.failing if kind == "failing" else printing(getattr(problem, kind), rng)
        result = interpreter.call({"code": code}).text
        yield f"<code>{code}</code>", True
        yield shown(result, tokenizer), False
    boxed = {"result": result.strip(), "guess": problem.answer, "slip": corrupt(problem.answer, rng)}[route.box]
    yield f"{BOX}{boxed}}}{END}", True


def draw_example(tokenizer: PreTrainedTokenizerFast, held_out: set[frozenset[int]], rng: random.Random) -> Example:
    """Draw a warm-start example, levels equally likely."""
    while True:
        level = rng.choice(list(LEVELS.values()))
        problem = level.draw(rng)
        if operands({"problem": problem.text}) not in held_out:
            break
    ids = tokenizer.encode(f"{USER}{problem.text}{ASSISTANT}")
    labels = [NOT_LEARNED] * len(ids)
    for text, learned in dialogue(problem, draw_route(level, rng), tokenizer, rng):
        part = tokenizer.encode(text)
        ids += part
        labels += part if learned else [NOT_LEARNED] * len(part)
    return ids, labels


def warm_start_batches(
    tokenizer: PreTrainedTokenizerFast, held_out: set[frozenset[int]], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of examples of similar length, in random order, without end."""
    rng = random.Random(seed)
    while True:
        examples = [draw_example(tokenizer, held_out, rng) for _ in range(POOL * size)]
        examples.sort(key=lambda example: len(example[0]))
        starts = list(range(0, len(examples), size))
        rng.shuffle(starts)
        for start in starts:
            yield pad_batch(examples[start : start + size], int(tokenizer.pad_token_id))


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    interpreter: PythonInterpreter | None,
    turns: int = 3,
    max_tokens: int = 80,
) -> list[str]:
    """Complete texts at temperature 1, programs answered by ``interpreter``, without one left as they are.

    Args:
        policy: the policy.
        tokenizer: the policy's.
        texts: prompts in the chat template, or more.
        interpreter: started.
        turns: most programs of one completion.
        max_tokens: most tokens of one turn.
    """
    policy.eval()
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</code>")]
    done = list(texts)
    going = list(range(len(done)))
    for _ in range(turns + 1):
        for start in range(0, len(going), 256):
            part = going[start : start + 256]
            inputs = tokenizer([done[i] for i in part], return_tensors="pt", padding=True, return_token_type_ids=False)
            output = policy.generate(
                **inputs, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=max_tokens, eos_token_id=stops
            )
            written = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(part, written, strict=True):
                done[i] += text
        if interpreter is None:
            break
        going = [i for i in going if done[i].endswith("</code>")]
        for i in going:
            code = done[i].rpartition("<code>")[2].removesuffix("</code>")
            done[i] += shown(interpreter.call({"code": code}).text, tokenizer)
    return done


def measure_success(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    samples: int,
    interpreter: PythonInterpreter | None,
    opening: str = "",
) -> Tensor:
    """Sample completions that begin with ``opening`` and grade the box. Returns (M, samples) bool."""
    prompts = [f"{USER}{row['problem']}{ASSISTANT}{opening}" for row in rows for _ in range(samples)]
    answers = [row["answer"] for row in rows for _ in range(samples)]
    texts = sample(policy, tokenizer, prompts, interpreter)
    return torch.tensor([last_boxed(t) == a for t, a in zip(texts, answers, strict=True)]).view(len(rows), samples)


def report(title: str, rows: Sequence[Row], success: Tensor) -> str:
    """Put success by level and the spread over prompts into words. ``success`` is (M, samples) bool."""
    rate = success.double().mean(dim=1)
    levels = torch.tensor([int(row["level"]) for row in rows])
    by_level = "  ".join(f"{level}: {rate[levels == level].mean():.3f}" for level in LEVELS)
    counts = torch.bincount(success.sum(dim=1), minlength=success.shape[1] + 1).tolist()
    return f"{title}: mean success {rate.mean():.4f}; by level {by_level}; prompts by successes {counts}"


def main() -> None:
    """Write ``train.jsonl``, ``val.jsonl``, ``test.jsonl`` and the folder ``policy``."""
    description = "Make the tool quickstart's data and policy."
    args = parse_args(description, "quickstart_tools", steps=3000, batch_size=16, lr=2e-3)
    splits = make_splits(args.seed)
    write_splits(splits, args.output)
    if args.data_only:
        return
    tokenizer = make_tokenizer(WORDS, CHARACTERS, MODEL_MAX_LENGTH)
    held_out = {operands(row) for split in ("val", "test") for row in splits[split]}
    saved = write_policy(tokenizer, warm_start_batches(tokenizer, held_out, args.batch_size, args.seed + 1), args)

    rows = splits["test"]
    print(report("in the head", rows, measure_success(saved, tokenizer, rows, 8, None, opening=BOX)))
    interpreter = PythonInterpreter()
    interpreter.start()
    print(report("with the interpreter", rows, measure_success(saved, tokenizer, rows, 8, interpreter)))
    interpreter.close()


if __name__ == "__main__":
    main()
