"""avg@k, pass@k and maj@k against enumeration, by hand, and over two real processes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import comb, nan
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pyarrow import parquet
from torch import Tensor

from spo_lightning.distributed import Ranks
from spo_lightning.evaluation import BenchmarkEvaluator
from spo_lightning.generation_files import BenchmarkRow, GenerationSettings, GenerationWriter
from spo_lightning.metrics import (
    AverageAtK,
    CompletionsMetric,
    MajorityAtK,
    PassAtK,
    cluster_answers,
    evaluation_metrics,
)

Row = tuple[int, int, float, int]  # problem, sample, reward, answer class


def tensors(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, sample, reward, answer = zip(*rows, strict=True) if rows else ((), (), (), ())
    as_int = {"dtype": torch.int64}
    return (
        torch.tensor(problem, **as_int),
        torch.tensor(sample, **as_int),
        torch.tensor(reward, dtype=torch.float64),
        torch.tensor(answer, **as_int),
    )


def value(metric: CompletionsMetric, rows: Sequence[Row]) -> float:
    metric.update(*tensors(rows))
    return metric.compute().item()


def one_problem(rewards: Sequence[float], answers: Sequence[int] | None = None) -> list[Row]:
    answers = answers if answers is not None else [-1] * len(rewards)
    return [(0, i, r, a) for i, (r, a) in enumerate(zip(rewards, answers, strict=True))]


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        rewards = [1.0] * correct + [0.0] * (n - correct)
        subsets = list(itertools.combinations(rewards, k))
        expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
        assert value(PassAtK(k), one_problem(rewards)) == pytest.approx(float(expected), abs=1e-15)


def test_pass_at_k_of_many_samples() -> None:
    """Where C(n, k) is beyond float64 the exact integers still agree."""
    n, correct, k = 2000, 3, 900
    expected = 1 - Fraction(comb(n - correct, k), comb(n, k))
    assert value(PassAtK(k), one_problem([1.0] * correct + [0.0] * (n - correct))) == pytest.approx(float(expected))


def test_pass_threshold() -> None:
    rows = one_problem([0.5, 0.6, 0.0])
    assert value(PassAtK(1), rows) == pytest.approx(1 / 3)
    assert value(PassAtK(1, success_threshold=0.4), rows) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("rewards", "answers", "expected"),
    [
        ([1, 1, 0, 0, 0], [0, 0, 1, 2, 3], 1.0),  # the plurality, not the average
        ([1, 0, 0], [0, 1, 1], 0.0),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0.5),  # a tie of two
        ([1, 0, 0], [0, 1, 2], 1 / 3),  # a tie of three
        ([1, 0, 0, 0], [0, -1, -1, -1], 1.0),  # those without an answer do not vote
        ([0, 0], [-1, -1], 0.0),
        ([1, 1], [-1, -1], 0.0),  # nor does a reward without an answer count
        ([0.25, 0.75, 0], [4, 4, 1], 0.5),  # the mean reward of the winning class
        ([1, 1, 1, nan], [0, 0, 0, 0], 1.0),  # an undecided one does not lower it
        ([1, nan, nan, 0], [0, 1, 1, 2], 0.0),  # but votes; a class without any decided one is worth 0
        ([1, nan, 0, 0], [0, 0, 1, 1], 0.5),
        ([1, nan], [0, -1], 1.0),
    ],
)
def test_majority_by_hand(rewards: list[float], answers: list[int], expected: float) -> None:
    assert value(MajorityAtK(len(rewards)), one_problem(rewards, answers)) == pytest.approx(expected)


def test_undecided_completions_are_wrong_in_the_average_and_in_pass_at_k() -> None:
    rows = one_problem([1.0, nan, 0.0, nan])
    assert value(AverageAtK(), rows) == 1 / 4
    assert value(PassAtK(1), rows) == pytest.approx(1 / 4)


def plurality(rewards: Sequence[float], answers: Sequence[int]) -> float:
    """Expected reward when one of the most frequent answers is drawn fairly, then one of those who gave it."""
    votes = Counter(a for a in answers if a >= 0)
    winners = [a for a, count in votes.items() if count == max(votes.values())]
    mean = [sum(r for r, b in zip(rewards, answers, strict=True) if b == a) / votes[a] for a in winners]
    return sum(mean) / len(mean) if mean else 0.0


def test_majority_over_every_small_case() -> None:
    cases = list(itertools.product([0.0, 1.0], repeat=3)), list(itertools.product([-1, 0, 1], repeat=3))
    for rewards, answers in itertools.product(*cases):
        assert value(MajorityAtK(3), one_problem(rewards, answers)) == pytest.approx(plurality(rewards, answers))


def test_majority_of_fewer_than_all_takes_disjoint_blocks_by_sample_number() -> None:
    rewards, answers = [1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1, 0]
    blocks = [plurality(rewards[i : i + 3], answers[i : i + 3]) for i in (0, 3)]
    assert blocks == [0.0, 1.0]
    rows = one_problem(rewards, answers)
    assert value(MajorityAtK(3), rows) == 0.5
    assert value(MajorityAtK(3), rows[::-1]) == 0.5  # by number, not by arrival


def test_means_weigh_problems_not_completions() -> None:
    rows = [(7, 0, 1.0, 0), (3, 0, 0.0, 0), (3, 1, 0.0, 0), (3, 2, 1.0, 0), (3, 3, 0.0, 0)]
    assert value(AverageAtK(), rows) == pytest.approx((1 + 1 / 4) / 2)
    assert value(PassAtK(1), rows) == pytest.approx((1 + 1 / 4) / 2)


@pytest.mark.parametrize("metric", [PassAtK(4), MajorityAtK(4)])
def test_fewer_samples_than_k(metric: CompletionsMetric) -> None:
    metric.update(*tensors(one_problem([1.0, 0.0, 0.0])))
    with pytest.raises(ValueError, match="@4 of a problem with 3 completions"):
        metric.compute()


def test_bad_arguments() -> None:
    for metric in (PassAtK, MajorityAtK):
        with pytest.raises(ValueError, match="k is 0"):
            metric(0)
    with pytest.raises(ValueError, match=r"pass_at holds \[0, 9\] with 8 completions"):
        evaluation_metrics(8, (1, 0, 9))
    with pytest.raises(ValueError, match=r"sample \(2,\).*same shape"):
        AverageAtK().update(torch.zeros(1), torch.zeros(2), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"same shape \(N,\)"):
        AverageAtK().update(*[torch.zeros(1, 1)] * 4)


def random_rows(problems: int, samples: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(-1, 3, (problems, samples), generator=generator).tolist()
    return [(p, s, float(answers[p][s] == 0), answers[p][s]) for p in range(problems) for s in range(samples)]


def computed(rows: Sequence[Row], batch_size: int) -> dict[str, float]:
    metrics = evaluation_metrics(4, (1, 2, 4))
    for start in range(0, len(rows), batch_size):
        metrics.update(*tensors(rows[start : start + batch_size]))
    return {name: tensor.item() for name, tensor in metrics.compute().items()}


def test_collection_against_plain_python() -> None:
    rows = random_rows(5, 4)
    problems = [[row for row in rows if row[0] == p] for p in range(5)]
    correct = [int(sum(row[2] for row in problem)) for problem in problems]
    expected = {f"pass_at_{k}": sum(1 - comb(4 - c, k) / comb(4, k) for c in correct) / 5 for k in (1, 2, 4)}
    expected["avg_at_4"] = sum(correct) / 20
    expected["maj_at_4"] = sum(plurality([row[2] for row in p], [row[3] for row in p]) for p in problems) / 5
    assert computed(rows, batch_size=3) == pytest.approx(expected)


def test_batches_order_and_duplicates_do_not_matter() -> None:
    rows = random_rows(5, 4)
    expected = computed(rows, batch_size=20)
    assert len(set(expected.values())) > 3
    shuffled = [rows[i] for i in torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()]
    assert computed(shuffled, batch_size=1) == expected
    assert computed(rows + shuffled[:7], batch_size=6) == expected


def test_reset_forgets() -> None:
    metric = AverageAtK()
    assert value(metric, one_problem([1.0])) == 1.0
    metric.reset()
    assert value(metric, one_problem([0.0])) == 0.0


def test_low_precision_training_does_not_touch_the_metric() -> None:
    """A module in bfloat16 casts what it holds; completions beyond 256 must keep their numbers."""
    module = torch.nn.ModuleDict({"metric": AverageAtK()}).to(torch.bfloat16)
    rows = [(p, 0, float(p % 2), 0) for p in range(1001)]
    assert value(module["metric"], rows) == pytest.approx(500 / 1001)


SHARDS = {
    "even": ([0, 1, 2, 3], [4, 5, 6, 7]),
    "uneven": ([0], [1, 2, 3, 4, 5, 6, 7]),
    "padded": ([0, 2, 4, 6, 0], [1, 3, 5, 7, 1]),  # a distributed sampler repeats the first ones
    "empty": ([], [0, 1, 2, 3, 4, 5, 6, 7]),
}


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    rows = random_rows(8, 4)
    results = {}
    for name, shards in SHARDS.items():
        metrics = evaluation_metrics(4, (1, 2, 4))
        for problem in shards[rank]:
            metrics.update(*tensors([row for row in rows if row[0] == problem]))
        results[name] = {key: tensor.item() for key, tensor in metrics.compute().items()}
        scores = {key: metric.scores() for key, metric in metrics.items(copy_state=False)}
        assert {key: values.mean().item() for key, values in scores.items()} == results[name]
        assert scores["avg_at_4"].tolist() == [sum(row[2] for row in rows if row[0] == p) / 4 for p in range(8)]
    results["kept"] = keep(Path(folder), [[[3], [0, 6], [4]], [[7, 1, 2, 5]]][rank])
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def keep(folder: Path, batches: Sequence[Sequence[int]]) -> dict[str, float]:
    """Keep and count the completions of some problems as one of the ranks; the means over all ranks."""
    ranks = Ranks()
    settings = GenerationSettings("b", 4, 8, True, "policy", None, None, {}, 0, "R", {})
    writer = GenerationWriter(folder / f"kept_by_{ranks.world_size}.parquet", settings, ranks)
    evaluator = BenchmarkEvaluator(4, torch.device("cpu"), with_tools=True)
    for problems in batches:
        rows = [
            BenchmarkRow(p, s, f"p{p}", "", "", f"{p} {s}", None, None, a, r, "", 10**9 + 3 * p + s, "stop", p % 3)
            for p, s, r, a in random_rows(8, 4)
            if p in problems
        ]
        writer.write(rows)
        evaluator.update(rows)
    writer.finish()
    return evaluator.compute().means


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    expected = computed(random_rows(8, 4), batch_size=32)
    kept = keep(tmp_path, [range(8)])
    assert kept["mean_length"] == 10**9 + 12  # 3 times 3.5, and 1.5: 32 bits would round it
    for rank in range(2):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert results.pop("kept") == kept
        assert results == dict.fromkeys(SHARDS, expected)
    whole, parted = (parquet.read_table(tmp_path / f"kept_by_{n}.parquet") for n in (1, 2))
    assert len(parted) == 32 and parted.equals(whole, check_metadata=True)


class Equality:
    """Equality by value where both are fractions; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self.calls.append(list(pairs))
        return [Fraction(first) == Fraction(second) for first, second in pairs]


def test_cluster_answers() -> None:
    equivalent = Equality()
    answers = ["1/2", None, "0.5", "2", " 1/2 ", "4/2", "3", None]
    assert cluster_answers([answers], equivalent) == [[0, -1, 0, 1, 0, 1, 2, -1]]
    assert len(equivalent.calls) == 1 and len(equivalent.calls[0]) == comb(5, 2)


def test_cluster_asks_nothing_about_equal_texts() -> None:
    equivalent = Equality()
    assert cluster_answers([["7", "7", None, " 7"], [], [None]], equivalent) == [[0, 0, -1, 0], [], [-1]]
    assert equivalent.calls == []


def test_cluster_groups_share_one_call_and_stay_apart() -> None:
    equivalent = Equality()
    groups = [["1", "2"], ["2", "1", "2/2"], [], ["1", "2"]]
    assert cluster_answers(groups, equivalent) == [[0, 1], [0, 1, 1], [], [0, 1]]
    (pairs,) = equivalent.calls
    assert len(pairs) == len(set(pairs)) == 4  # (1, 2) of two groups is asked once


def test_cluster_joins_the_first_class_whose_first_member_is_equal() -> None:
    """50% equals 50 and 0.5, which are not equal."""

    def equivalent(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return ["50%" in pair for pair in pairs]

    assert cluster_answers([["50", "0.5", "50%"], ["50%", "50", "0.5"]], equivalent) == [[0, 1, 0], [0, 0, 0]]
