"""Grading in worker processes: verdicts on real answers, and what happens when a worker hangs or dies."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spo_lightning.rewards import MathVerifyReward
from spo_lightning.rewards.extraction import clean_answer, quick_verdict
from spo_lightning.rewards.process_pool import TaskResult, TimedPool

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real benchmark rows is not there")

BRUMO_SET = [r"\frac{3-i\sqrt{3}}{2}", "3", r"\frac{3+i\sqrt{3}}{2}", "2"]


FAULTS = """
import os, struct, sys

def judge(reference, text, boxed):
    if text == "hang":
        9**9**9**9  # a loop in C that no Python signal handler interrupts
    if text == "die":
        os._exit(7)
    if text == "die in mid-word":
        os.write(int(sys.argv[1]), struct.pack("!i", 100) + b"half of it")
        os._exit(7)
    if text == "raise":
        raise RecursionError("as asked")
    return True, text

def pid():
    return os.getpid()

def modules_with_grader():
    import spo_lightning.rewards.math_worker
    return list(sys.modules)
"""


# Real answers.


@pytest.fixture(scope="module")
def reward() -> Iterator[MathVerifyReward]:
    reward = MathVerifyReward(time_limit=60.0)
    yield reward
    reward.close()


def benchmark_golds() -> list[str]:
    rows = [json.loads(line) for path in (DATA / "benchmarks").glob("*.jsonl") for line in path.open()]
    return [str(row["answer"]) for row in rows]


def gsm8k_golds() -> list[str]:
    rows = [json.loads(line) for path in (DATA / "gsm8k").glob("*.jsonl") for line in path.open()]
    return [row["answer"].rpartition("####")[2].strip() for row in rows]


def verdicts(reward: MathVerifyReward, pairs: list[tuple[str, str]]) -> list[bool | None]:
    """Of the workers alone, without the shortcut."""
    results = reward._pool.run("judge", [(clean_answer(gold), clean_answer(answer), True) for gold, answer in pairs])
    return [result.value[0] for result in results]


@needs_data
def test_every_gold_answer_is_correct(reward: MathVerifyReward) -> None:
    golds = benchmark_golds() + gsm8k_golds()
    assert len(golds) == 120 + 8792
    grades = reward.grade([f"The answer is $\\boxed{{{gold}}}$." for gold in golds], golds, golds)
    assert [gold for gold, grade in zip(golds, grades, strict=True) if grade.value != 1.0] == []
    assert [grade.answer for grade in grades] == golds
    assert reward.check_references(golds) == []


@needs_data
def test_shortcut_and_worker_agree(reward: MathVerifyReward) -> None:
    golds = sorted(set(benchmark_golds()) | set(gsm8k_golds()))
    thousands = [gold for gold in golds if "," in gold and quick_verdict(gold, gold.replace(",", ""))]
    assert len(thousands) > 20 and "025" in golds
    pairs = [(gold, gold) for gold in golds]
    pairs += [(gold, gold.replace(",", "")) for gold in thousands]
    pairs += list(zip(golds, golds[1:], strict=False))[::5]  # nearly all of them wrong
    pairs += [("025", "25"), ("25", "-25"), ("0.5", "0.50"), ("1,000", "1000.0"), ("+5", "5"), ("-0", "0")]
    shortcut = [quick_verdict(clean_answer(a), clean_answer(b)) for a, b in pairs]
    worker = verdicts(reward, pairs)
    differing = [(p, s, w) for p, s, w in zip(pairs, shortcut, worker, strict=True) if s is not None and s != w]
    assert differing == []
    assert shortcut.count(True) > len(golds) and shortcut.count(False) > 100


@pytest.mark.parametrize(
    ("reference", "answer", "value"),
    [
        ("025", "25", 1.0),
        ("70", r"x = 70", 1.0),
        (r"\frac{1}{9}", r"\dfrac19", 1.0),
        (r"\frac{1}{9}", "1/9", 1.0),
        (r"\frac{1}{9}", r"\frac{1}{8}", 0.0),
        (r"\frac{\sqrt{13}}{2}", r"\sqrt{\frac{13}{4}}", 1.0),
        (r"\sqrt{23}-2 \sqrt{3}", r"-2\sqrt{3}+\sqrt{23}", 1.0),
        (r"\sqrt{23}-2 \sqrt{3}", r"2\sqrt{3}-\sqrt{23}", 0.0),
        (r"2^{25} \cdot 26!", r"26! \cdot 2^{25}", 1.0),
        (r"1-\frac{2}{\pi}", r"\frac{\pi-2}{\pi}", 1.0),
        (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\frac{-1 \pm \sqrt{17}}{2}", 1.0),
        (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\frac{1 \pm \sqrt{17}}{2}", 0.0),
        (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\frac{-1+\sqrt{17}}{2}", 0.0),
        ("1000", "1,000", 1.0),
        ("1,000", r"10\,00", 0.0),
        ("10000", r"10\,000", 1.0),
        ("10000", "10{,}000", 1.0),
        (r"\{1, 0\}", "1,000", 0.0),  # a thousands separator, not a set
        ("1, 200", "200, 1", 1.0),  # with a blank it is one
        ("50", r"50\%", 1.0),
        ("0.5", r"50\%", 1.0),
        ("0.5", r"5\%", 0.0),
        (r"\frac{1}{3}", "0.333333", 1.0),
        (r"\frac{1}{3}", "0.3333", 0.0),
        ("25", r"25^\circ", 1.0),
        ("25", r"25 \text{ cm}", 1.0),
        ("12", "12.", 1.0),
        ("12", r"\$12", 1.0),
        (r"$12$", "12", 1.0),
        (r"\boxed{12}", "12.0", 1.0),
        (r"\text{Tuesday}", r"\text{tuesday}", 1.0),
        (r"\text{Tuesday}", r"\text{Monday}", 0.0),
        ("7", "seven", 0.0),
        ("7", "maybe 7, or 8 or 9", 0.0),
        ("7", r"\sqrt", 0.0),
    ],
)
def test_answers(reward: MathVerifyReward, reference: str, answer: str, value: float) -> None:
    (grade,) = reward.grade([f"so \\boxed{{{answer}}}"], [reference], ["?"])
    assert (grade.value, grade.answer, grade.cause) == (value, answer, "")


def test_sets_compare_in_any_order(reward: MathVerifyReward) -> None:
    orders = [",".join(order) for order in itertools.permutations(BRUMO_SET)]
    gold = r"2,3,\frac{3+i\sqrt{3}}{2},\frac{3-i\sqrt{3}}{2}"
    grades = reward.grade([rf"\boxed{{{order}}}" for order in orders], [gold] * 24, ["?"] * 24)
    assert [grade.value for grade in grades] == [1.0] * 24
    for missing in range(4):
        fewer = ",".join(BRUMO_SET[:missing] + BRUMO_SET[missing + 1 :])
        assert reward.grade([rf"\boxed{{{fewer}}}"], [gold], ["?"])[0].value == 0.0


def test_no_answer_is_wrong_not_undecided(reward: MathVerifyReward) -> None:
    completions = ["it is 25", "", r"\boxed{}", r"<think>\boxed{25}", r"<think>\boxed{25}</think>"]
    grades = reward.grade(completions, ["25"] * 5, ["?"] * 5)
    assert [(grade.value, grade.answer) for grade in grades] == [(0.0, None)] * 5


def test_answer_outside_a_box() -> None:
    reward = MathVerifyReward(num_workers=1, time_limit=60.0, require_boxed=False)
    completions = ["The final answer is $\\frac{2}{4}$.", "The answer is 0.25", r"0.5, no: \boxed{3}", "no idea", " "]
    grades = reward.grade(completions, [r"\frac{1}{2}"] * 5, ["?"] * 5)
    reward.close()
    assert [grade.value for grade in grades] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [grade.answer for grade in grades] == [r"\frac{2}{4}", "0.25", "3", None, None]


def test_references_that_do_not_parse(reward: MathVerifyReward) -> None:
    references = ["5", r"\frac{1}{2}", "", r"\sqrt", r"\frac{1}{2}", "  "]
    assert reward.check_references(references) == [2, 3, 5]
    grades = reward.grade([r"\boxed{\frac{1}{2}}"] * 6, references, ["?"] * 6)
    assert [grade.value for grade in grades] == [0.0, 1.0, None, None, 1.0, None]
    assert {grade.cause for grade in grades if not grade.decided} == {"reference"}
    assert all(grade.answer == r"\frac{1}{2}" for grade in grades)


def test_equivalent(reward: MathVerifyReward) -> None:
    pairs = [("1/2", r"\frac12"), ("1/2", "0.25"), ("x=1", "1"), ("025", "25"), ("Z", "Z"), ("2,1", "1,2"), ("4", "5")]
    expected = [True, False, True, True, True, True, False]
    assert reward.equivalent(pairs) == expected
    assert reward.equivalent([pair[::-1] for pair in pairs]) == expected
    assert reward.equivalent([]) == []


def test_expression_that_never_ends() -> None:
    """A real one, through math-verify: an integer power that holds the interpreter's lock."""
    reward = MathVerifyReward(time_limit=3.0)
    try:
        warm_up = [rf"\boxed{{\frac{{1}}{{{n}}}}}" for n in range(8, 12)]
        assert {grade.value for grade in reward.grade(warm_up, [r"\frac{1}{7}"] * 4, ["?"] * 4)} == {0.0}
        tower = "9^{9^{9^{9}}}"
        grades = reward.grade([rf"\boxed{{{tower}}}", r"\boxed{\frac{2}{14}}"], [r"\frac{1}{7}"] * 2, ["?"] * 2)
        assert [(g.value, g.answer, g.cause) for g in grades] == [(None, tower, "timeout"), (1.0, r"\frac{2}{14}", "")]
        assert reward.equivalent([(tower, "2"), ("1/2", r"\frac12")]) == [False, True]
        assert reward.check_references([tower, "1/2"]) == []  # parsing alone does not evaluate it
    finally:
        reward.close()


# Faults.


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder, on the import path, of a module whose functions fail as their argument asks."""
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def pool(faults: Path) -> Iterator[TimedPool]:
    pool = TimedPool(num_workers=2, time_limit=1.0, module="faults")
    yield pool
    pool.close()


def tasks(*texts: str) -> list[tuple[str, str, bool]]:
    return [("", text, True) for text in texts]


def fine(text: str) -> TaskResult:
    return TaskResult((True, text))


TIMEOUT, CRASH = TaskResult(None, "timeout"), TaskResult(None, "crash")


def assert_gone(pids: list[int]) -> None:
    """Every process has ended, at once or within ten seconds."""
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie whose parent has not waited has ended
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids_of(pool: TimedPool) -> list[int]:
    return [worker._process.pid for worker in pool._workers]


def test_failures_stay_with_their_task(pool: TimedPool) -> None:
    texts = ["a", "die", "b", "hang", "c", "raise", "d", "die", "die", "die", "die", "e"]
    expected = [fine("a"), CRASH, fine("b"), TIMEOUT, fine("c"), CRASH, fine("d"), *[CRASH] * 4, fine("e")]
    assert pool.run("judge", tasks(*texts)) == expected
    assert pool.run("judge", tasks("f", "g")) == [fine("f"), fine("g")]


def test_a_worker_may_die_while_it_answers(pool: TimedPool) -> None:
    assert pool.run("judge", tasks("a", "die in mid-word", "b")) == [fine("a"), CRASH, fine("b")]


def test_every_worker_hangs_at_once(pool: TimedPool) -> None:
    assert pool.run("judge", tasks("hang", "hang", "a", "b")) == [TIMEOUT, TIMEOUT, fine("a"), fine("b")]


def test_worker_that_died_at_rest_is_replaced(pool: TimedPool) -> None:
    pool.run("judge", tasks("a", "b"))
    before = pids_of(pool)
    for one in before:
        os.kill(one, signal.SIGKILL)
    assert_gone(before)
    assert pool.run("judge", tasks("a", "b", "c")) == [fine("a"), fine("b"), fine("c")]


def test_workers_are_kept_between_calls(pool: TimedPool) -> None:
    pool.run("judge", tasks("a", "b"))
    before = pids_of(pool)
    assert {result.value for result in pool.run("pid", [()] * 8)} <= set(before)
    assert pids_of(pool) == before and os.getpid() not in before


def test_start_does_not_count_against_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\ndef double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = TimedPool(1, time_limit=0.75, module="slow_to_import")
    assert pool.run("double", [(4,), (5,)]) == [TaskResult(8), TaskResult(10)]
    pool.close()


def test_module_that_cannot_be_imported() -> None:
    with pytest.raises(RuntimeError, match="3 worker processes in a row.*import no_such_module"):
        TimedPool(1, 1.0, "no_such_module").run("judge", tasks("a"))


def test_close_and_collection_leave_no_process(pool: TimedPool) -> None:
    other = TimedPool(1, 1.0, "faults")
    other.run("judge", tasks("a"))
    pool.run("judge", tasks("a", "b"))
    closed, collected = pids_of(pool), pids_of(other)
    pool.close()
    del other
    gc.collect()
    assert_gone(closed + collected)
    assert pool.run("judge", tasks("c")) == [fine("c")]


def test_interrupted_call_leaves_no_stale_result(pool: TimedPool) -> None:
    pool.run("judge", tasks("a", "b"))
    pool.time_limit = 60.0

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            pool.run("judge", tasks("hang", "hang"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert pool.run("judge", tasks("c", "d", "e")) == [fine("c"), fine("d"), fine("e")]


def test_workers_die_with_a_killed_parent(faults: Path) -> None:
    """One at rest, one in an endless loop in C."""
    code = f"""
import sys, threading; sys.path.insert(0, {str(faults)!r})
from spo_lightning.rewards.process_pool import TimedPool
pool = TimedPool(2, 600.0, "faults")
starter = threading.Thread(target=pool.run, args=("judge", [("", "a", True)] * 2))
starter.start(); starter.join()  # outliving the thread that started them is part of the claim
assert all(not result.failure for result in pool.run("pid", [()] * 2))
print(*[worker._process.pid for worker in pool._workers], flush=True)
pool.run("judge", [("", "hang", True)])
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)  # let the hanging task reach its worker
    assert all(_runs(one) for one in pids)
    parent.kill()
    parent.communicate()
    assert_gone(pids)


def test_program_without_a_main_guard(tmp_path: Path) -> None:
    """Workers know nothing of the main module: an unguarded script runs once."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from spo_lightning.rewards.process_pool import TimedPool\n"
        "print('once')\n"
        "print(TimedPool(1, 60.0, 'spo_lightning.rewards.math_worker').run('parses', [('x',)])[0].value)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "once\nTrue\n"


def test_grading_process_is_light(pool: TimedPool) -> None:
    pool.time_limit = 60.0
    loaded = pool.run("modules_with_grader", [()])[0].value
    assert "math_verify" in loaded
    assert not {"torch", "transformers", "lightning", "numpy"} & set(loaded)
