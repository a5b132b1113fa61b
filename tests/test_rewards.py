"""Extraction, exact match, function rewards and their configuration: nothing here starts a worker."""

from __future__ import annotations

import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from spo_lightning.protocols import Reward
from spo_lightning.rewards import ExactMatchReward, FunctionReward, MathVerifyReward
from spo_lightning.rewards.extraction import clean_answer, last_boxed, plain_number, quick_verdict, visible_text
from spo_lightning.types import Grade


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),  # an escaped brace needs no partner
        (r"\boxed{a\\b}", r"a\\b"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{ 9 }", "9"),
        (r"\boxed{3} then \boxed{4", "3"),  # cut off in mid-answer
        (r"set {1, \boxed{6}", "6"),
        (r"} } \boxed{6}", "6"),
        (r"\boxed{}", None),
        (r"\boxed{1} or \boxed{}", None),
        (r"\boxed{1", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_last_boxed_is_linear_in_hostile_text() -> None:
    """Quadratic search would take hours here, not the suite's time-out."""
    assert last_boxed(r"\boxed{" * 200_000) is None
    assert last_boxed("\\" * 1_000_000 + r"boxed{2}") == "2"


@pytest.mark.parametrize(
    ("completion", "visible"),
    [
        ("<think>1</think>2", "2"),
        ("<think>1</think><think>2</think>3", "3"),
        ("1</think>2", "2"),  # templates that open the thought in the prompt
        ("<think>1", ""),
        ("<think>1</think>2<think>3", ""),
        ("plain", "plain"),
    ],
)
def test_visible_text(completion: str, visible: str) -> None:
    assert visible_text(completion, strip_think=True) == visible
    assert visible_text(completion, strip_think=False) == completion


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("025", Fraction(25)),
        ("-984", Fraction(-984)),
        ("+5", Fraction(5)),
        ("1,000", Fraction(1000)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("0.50", Fraction(1, 2)),
        ("1,00", None),
        ("0,123", None),
        ("1,2", None),
        ("1/2", None),
        ("1e3", None),
        ("50%", None),
        ("\N{ARABIC-INDIC DIGIT FIVE}", None),
        ("9" * 5000, None),  # int() refuses it
        ("", None),
    ],
)
def test_plain_number(text: str, value: Fraction | None) -> None:
    assert plain_number(text) == value


@pytest.mark.parametrize(
    ("text", "clean"),
    [(r" \boxed{5} ", "5"), ("12.", "12"), (r"10\,000", "10000"), ("1{,}000", "1000"), (r"a\,b", r"a\,b")],
)
def test_clean_answer(text: str, clean: str) -> None:
    assert clean_answer(text) == clean


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [
        (("025", "25"), True),
        (("24", "25"), False),
        (("0.5", "0.50"), True),
        (("0.3333333", "0.3333332"), None),  # equal to math-verify, which rounds
        (("2.5", "2"), None),
        ((r"\frac12", r"\frac12"), True),
        ((r"\frac12", "0.5"), None),
    ],
)
def test_quick_verdict(pair: tuple[str, str], verdict: bool | None) -> None:
    assert quick_verdict(*pair) is verdict
    assert quick_verdict(*pair[::-1]) is verdict


@pytest.mark.parametrize(
    ("reward", "completion", "grade"),
    [
        (ExactMatchReward(), r"\boxed{25}", Grade(1.0, "25")),
        (ExactMatchReward(), r"\boxed{025}", Grade(0.0, "025")),
        (ExactMatchReward(), "25", Grade(0.0)),
        (ExactMatchReward(pattern=r"= (\d+)"), "1 = 2, so = 25", Grade(1.0, "25")),
        (ExactMatchReward(pattern=r"= (\d+)"), "1 = 25, so = 2", Grade(0.0, "2")),
        (ExactMatchReward(pattern=r"\d+$"), "it is 25", Grade(1.0, "25")),
        (ExactMatchReward(pattern=r"=(.*)"), "= ", Grade(0.0)),
        (ExactMatchReward(pattern=r"\d+"), "none", Grade(0.0)),
        (ExactMatchReward(), r"<think>\boxed{25}", Grade(1.0, "25")),
        (ExactMatchReward(strip_think=True), r"<think>\boxed{25}", Grade(0.0)),
    ],
)
def test_exact_match(reward: ExactMatchReward, completion: str, grade: Grade) -> None:
    assert reward.grade([completion], [" 25 "], ["?"]) == [grade]


def test_exact_match_without_an_answer_never_equals_an_empty_reference() -> None:
    assert ExactMatchReward().grade(["nothing", r"\boxed{}"], ["", ""], ["?", "?"]) == [Grade(0.0), Grade(0.0)]


@pytest.mark.parametrize(("pattern", "rule"), [("(", "regular expression"), ("(a)(b)", "2 groups")])
def test_exact_match_refuses_patterns(pattern: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        ExactMatchReward(pattern=pattern)


def test_unequal_lengths_are_refused() -> None:
    for reward in (ExactMatchReward(), FunctionReward(length_reward), MathVerifyReward()):
        with pytest.raises(ValueError):
            reward.grade(["a"], ["a", "b"], ["?"])


def length_reward(completion: str, reference: str, prompt: str) -> float | None:
    """Say how long it is, in units of the prompt; undecided when empty."""
    return len(completion) / len(prompt) if completion else None


def wrong_type(completion: str, reference: str, prompt: str) -> str:
    return completion


def test_function_reward() -> None:
    grades = FunctionReward(f"{__name__}:length_reward").grade([r"\boxed{12}", ""], ["", ""], ["ab", "ab"])
    assert grades == [Grade(5.0, "12"), Grade(None, None, "undecided")]
    assert FunctionReward(length_reward).equivalent([("1", " 1"), ("1", "1.0")]) == [True, False]


@pytest.mark.parametrize(
    ("function", "error", "names"),
    [
        (wrong_type, TypeError, "wrong_type returned 'x' of type str"),
        (lambda *_: float("nan"), ValueError, "lambda.* returned nan"),
        (lambda *_: 1 // 0, ZeroDivisionError, "division"),
    ],
)
def test_function_reward_that_misbehaves(function: object, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        FunctionReward(function).grade(["x"], ["x"], ["x"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("math", "package.module:function"),
        ("math:nothing", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("math:pi", "must be callable"),
        (
            f"{__name__}:of_a_batch",
            r"of_a_batch\(completions, \*\*columns\) cannot be called.*one completion at a time",
        ),
    ],
)
def test_function_reward_refuses_paths(path: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        FunctionReward(path)


def of_a_batch(completions, **columns):
    """As TRL calls its own."""
    return [1.0 for _ in completions]


def of_three_texts(solution_str, ground_truth, prompt, data_source=None):
    return float(solution_str == ground_truth)


def of_verl(data_source, solution_str, ground_truth, extra_info=None):
    """As verl calls its own."""
    return float(solution_str == ground_truth)


async def awaited(completion, reference, prompt):
    return 1.0


class Awaited:
    async def __call__(self, completion, reference, prompt):
        return 1.0


def test_a_function_with_verls_parameters_is_refused_with_the_wrapper_that_works() -> None:
    with pytest.raises(ValueError, match=r"of_verl\(data_source, .* has verl's parameters") as refused:
        FunctionReward(f"{__name__}:of_verl")
    head, body = str(refused.value).split("name a wrapper instead: ")[1].split(": ")
    assert FunctionReward(of_three_texts).grade(["7"], ["7"], [""]) == [Grade(1.0)]  # its order is ours
    scope = {"of_verl": of_verl}
    exec(f"{head}: {body}", scope)
    assert FunctionReward(scope["score"]).grade(["7", "8"], ["7", "7"], ["", ""]) == [Grade(1.0), Grade(0.0)]


@pytest.mark.parametrize("function", [awaited, Awaited()])
def test_an_async_function_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="is async, .*write a plain function, which may call asyncio.run"):
        FunctionReward(function)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "answer"), [(None, "7"), (r"#### (\d+)", "42"), (r"\d+ apples", "3 apples"), ("no", None)]
)
def test_function_reward_finds_the_answer_that_votes(pattern: str | None, answer: str | None) -> None:
    text = r"#### 41, \boxed{7}, 3 apples, #### 42"
    reward = pickle.loads(pickle.dumps(FunctionReward(length_reward, pattern)))  # to processes of a user's own
    assert reward.grade([text], [""], ["p"])[0].answer == answer
    with pytest.raises(ValueError, match="with 2 groups; only the answer"):
        FunctionReward(length_reward, "(a)(b)")


def test_math_verify_collects_every_problem() -> None:
    with pytest.raises(ValueError, match=r"num_workers is 0.*time_limit is -1"):
        MathVerifyReward(num_workers=0, time_limit=-1)


@pytest.mark.parametrize(
    ("value", "grade"),
    [(True, 1.0), (np.True_, 1.0), (np.float32(0.5), 0.5), (np.int64(1), 1.0), (torch.tensor(0.25), 0.25)],
)
def test_a_function_may_return_any_scalar(value, grade) -> None:
    (found,) = FunctionReward(lambda *_: value).grade(["x"], ["x"], ["x"])
    assert (found.value, type(found.value)) == (grade, float)


FUNCTION = "spo_lightning.rewards.FunctionReward"


class UserReward(Reward):
    """A reward as a user would write one in a hurry: no annotations, only what must be there."""

    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def grade(self, completions, references, prompts):
        return [Grade(self.bonus) for _ in completions]


@pytest.mark.parametrize(
    ("class_path", "init_args", "attribute"),
    [
        ("spo_lightning.rewards.ExactMatchReward", {"pattern": "a"}, ("pattern", "a")),
        ("spo_lightning.rewards.MathVerifyReward", {"require_boxed": False}, ("require_boxed", False)),
        (FUNCTION, {"function": f"{__name__}:length_reward"}, ("function", length_reward)),
        (FUNCTION, {"function": f"{__name__}.length_reward"}, ("function", length_reward)),
        (f"{__name__}.UserReward", {"bonus": 0.5}, ("bonus", 0.5)),
    ],
)
def test_any_reward_by_class_path(class_path: str, init_args: dict[str, object], attribute: tuple[str, object]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    config = parser.parse_object({"reward": {"class_path": class_path, "init_args": init_args}})
    reward = parser.instantiate(config).reward
    assert isinstance(reward, Reward)
    assert getattr(reward, attribute[0]) == attribute[1]


def test_reward_package_is_lazy() -> None:
    """Naming the package, or the grader's worker module, loads neither torch nor the graders of other rewards."""
    code = (
        "import sys, spo_lightning.rewards, spo_lightning.rewards.math_worker; "
        "bad = {'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_reward_name() -> None:
    import spo_lightning.rewards

    with pytest.raises(AttributeError, match="it offers ExactMatchReward"):
        spo_lightning.rewards.NoSuchReward  # noqa: B018
