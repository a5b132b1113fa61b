"""The throughput simulation against closed forms, brute force and batches worked out by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from math import gamma
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet, table

from spo_lightning.rollouts.collection import Collection
from spo_lightning.types import RolloutRequest, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import simulate_throughput as script  # noqa: E402

from simulation.collecting import Setting, collect_batches, repeat  # noqa: E402
from simulation.engine import SimulatedEngine  # noqa: E402
from simulation.latencies import (  # noqa: E402
    Exponential,
    Latency,
    LogNormal,
    Mixture,
    Pareto,
    Trace,
    expected_time,
    read_trace,
)
from simulation.study import both, expected, families, speed_up  # noqa: E402

DROP, CARRY = Collection(unfinished="drop"), Collection()


class Scripted(Latency):
    """Latencies in the order the requests come, whatever their seeds; those that come again change nothing."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)

    def at(self, uniform):
        taken, self.seconds = self.seconds[: len(uniform)], self.seconds[len(uniform) :]
        return np.array(taken, dtype=float)


def by_hand(collection: Collection, latencies: list[float], iterations: int, **setting):
    """Seconds, kept latencies, mean age and number of dropped requests of every batch of 2 out of 4."""
    chosen = {"batch_size": 2, "oversampling": 2.0, "collection": collection} | setting
    batches, engine = collect_batches(Setting(Scripted(*latencies), **chosen), iterations, seed=0)
    return [(b.seconds, sorted(engine.latencies[i] for i in b.kept), b.staleness, b.dropped) for b in batches]


# Batches by hand. NaN stands for the latency of a request that comes again, which keeps the one it had.

AGAIN = float("nan")


def test_first_finished_with_the_rest_carried():
    assert by_hand(CARRY, [10, 1, 3, 7, AGAIN, AGAIN, 2, 5, AGAIN, AGAIN, 9, 9], 3) == [
        (3, [1, 3], 0, 0),
        (4, [2, 7], 0.5, 0),  # 7 has 4 left
        (3, [5, 10], 1.5, 0),  # 10 has 3 left, 5 has 1
    ]


def test_first_finished_with_the_rest_dropped():
    assert by_hand(DROP, [10, 1, 3, 7, 8, 4, 8, 4], 2) == [(3, [1, 3], 0, 2), (4, [4, 4], 0, 2)]


def test_the_oldest_are_waited_for():
    assert by_hand(Collection(take="oldest"), [10, 1, 3, 7, 2, 5, AGAIN, AGAIN, 9, 9], 3) == [
        (10, [1, 10], 0, 0),
        (0, [3, 7], 1, 0),  # they finished meanwhile
        (5, [2, 5], 0, 0),
    ]


def test_what_would_be_too_old_is_dropped():
    assert by_hand(replace(CARRY, max_staleness=0), [10, 1, 3, 7, 1, 1, 8, 8], 2) == [
        (3, [1, 3], 0, 2),
        (1, [1, 1], 0, 2),
    ]
    assert by_hand(replace(CARRY, max_staleness=1), [10, 1, 3, 7, AGAIN, AGAIN, 1, 1, 1, 1, 1, 1], 3) == [
        (3, [1, 3], 0, 0),
        (1, [1, 1], 0, 2),  # 10 and 7 would be two versions old in the next
        (1, [1, 1], 0, 0),
    ]


def test_what_never_began_does_not_age():
    assert by_hand(replace(CARRY, max_staleness=0), [5, 100, AGAIN, 1], 2, batch_size=1, workers=1) == [
        (5, [5], 0, 0),
        (100, [100], 0, 0),
    ]


def test_groups_are_complete_with_their_last_member():
    groups = replace(CARRY, whole_groups=True)
    assert by_hand(groups, [1, 9, 4, 5, AGAIN, 6, 7], 2, group_size=2) == [
        (5, [4, 5], 0, 0),
        (4, [1, 9], 1, 0),  # 9 has 4 left; 6 and 7 are not needed
    ]


def test_a_free_worker_takes_the_next_request():
    assert by_hand(DROP, [4, 1, 2, 9], 1, workers=2) == [(3, [1, 2], 0, 2)]


def test_an_engine_without_some_of_its_requests_goes_on_in_order():
    engine = SimulatedEngine(Scripted(1, 5, 2, 6, 7, 3, 4, 8), workers=7)
    engine.submit([RolloutRequest(number, (0,), SamplingParams(), seed=number) for number in range(8)])
    assert [c.request_id for c in engine.step()] == [0] and engine.clock == 1
    assert [(p.request_id, p.num_sampled) for p in engine.partials()] == [(n, int(n != 7)) for n in range(1, 8)]
    assert [(p.request_id, p.finish_reason) for p in engine.abort([2, 4])] == [(2, "aborted"), (4, "aborted")]
    order = [(engine.step()[0].request_id, engine.clock) for _ in range(5)]
    assert order == [(5, 3), (6, 4), (1, 5), (3, 6), (7, 9)] and engine.num_open == 0


# Brute force


@pytest.mark.parametrize("seed", range(5))
def test_with_a_worker_for_each_a_batch_ends_with_an_order_statistic(seed):
    for size, setting in both(Setting(LogNormal(100.0, 1.0))).items():
        batches, engine = collect_batches(setting, 1, seed)
        assert len(set(engine.drawn)) == 48
        complete = np.sort(np.reshape(engine.drawn, (-1, size)).max(axis=1))
        assert batches[0].seconds == complete[24 // size - 1]


@pytest.mark.parametrize("workers", [1, 7, 47])
def test_with_few_workers_a_batch_ends_as_when_a_list_is_worked_off(workers):
    batches, engine = collect_batches(Setting(Pareto(1.0, 1.5), workers=workers), 1, seed=3)
    free, ends = np.zeros(workers), []
    for seconds in engine.drawn:
        worker = free.argmin()
        free[worker] += seconds
        ends.append(free[worker])
    assert batches[0].seconds == pytest.approx(sorted(ends)[23], rel=1e-12)


def test_two_settings_meet_the_same_latencies():
    drawn = [collect_batches(s, 1, seed=5)[1].drawn for s in both(Setting(LogNormal(1.0, 1.0))).values()]
    assert drawn[0] == drawn[1]
    assert drawn[0] != collect_batches(Setting(LogNormal(1.0, 1.0)), 1, seed=6)[1].drawn


# Over iterations


@pytest.mark.parametrize("collection", [CARRY, DROP, Collection(take="oldest"), Collection(max_staleness=1)])
@pytest.mark.parametrize(("size", "workers"), [(1, None), (1, 5), (4, None), (4, 5)])
def test_every_request_is_taken_dropped_or_still_open(collection, size, workers):
    rules = replace(collection, whole_groups=size > 1)
    setting = Setting(LogNormal(10.0, 1.5), size, 8, 2.0, workers, rules)
    batches, engine = collect_batches(setting, 12, seed=1)
    open_before = 0
    for batch in batches:
        assert open_before + batch.drawn == 16 == 8 + batch.dropped + batch.carried
        assert len(batch.kept) == 8 and batch.staleness <= collection.max_staleness
        open_before = batch.carried
    assert len(engine.drawn) == 12 * 8 + sum(batch.dropped for batch in batches) + open_before


def test_what_is_carried_keeps_what_it_still_needs():
    setting = Setting(LogNormal(10.0, 1.0), 1, 8, 2.0, 11, Collection(max_staleness=50))
    batches, engine = collect_batches(setting, 12, seed=2)
    prompt_of = {span.request_id: span.prompt for span in engine.spans}
    worked: dict[int, float] = {}
    for span in engine.spans:
        worked[span.prompt] = worked.get(span.prompt, 0.0) + span.ended - span.began
    kept = [number for batch in batches for number in batch.kept]
    assert len({prompt_of[number] for number in kept}) == 12 * 8
    for number in kept:
        assert worked[prompt_of[number]] == pytest.approx(engine.latencies[number], rel=1e-9)
    assert max(batch.staleness for batch in batches) > 0
    assert {span.worker for span in engine.spans} == set(range(11))
    for worker in range(11):
        times = sorted((span.began, span.ended) for span in engine.spans if span.worker == worker)
        assert all(ended <= began for (_, ended), (began, _) in zip(times, times[1:], strict=False))


# Closed forms


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 2), (48, 24), (24, 24)])
def test_the_mean_of_exponential_order_statistics(n, k):
    """Between two ends the time is exponential with the number of those still running."""
    assert expected_time(Exponential(7.0), 1, n, k) == pytest.approx(7 * (harmonic(n) - harmonic(n - k)), rel=1e-4)
    assert expected_time(Exponential(7.0), n, 1, 1) == pytest.approx(7 * harmonic(n), rel=1e-4)


def test_the_mean_of_pareto_order_statistics():
    """E[X_(k:n)] = least · Γ(n + 1) Γ(n - k + 1 - 1/a) / (Γ(n - k + 1) Γ(n + 1 - 1/a))."""
    n, k, a = 12, 7, 2.5
    exact = gamma(n + 1) * gamma(n - k + 1 - 1 / a) / (gamma(n - k + 1) * gamma(n + 1 - 1 / a))
    assert expected_time(Pareto(3.0, a), 1, n, k) == pytest.approx(3 * exact, rel=1e-5)


@pytest.mark.parametrize(
    "latency", [LogNormal(5.0, 1.1), Pareto(2.0, 1.2), Mixture(Exponential(9.0), Exponential(1.0), 0.3)]
)
def test_the_mean_of_groups_against_drawn_numbers(latency):
    generator = np.random.default_rng(0)
    drawn = latency.at(generator.uniform(size=20_000 * 48)).reshape(-1, 6, 8)
    times = np.sort(drawn.max(axis=2), axis=1)[:, 2]
    error = times.std() / len(times) ** 0.5
    assert expected_time(latency, 8, 6, 3) == pytest.approx(times.mean(), abs=4 * error)


def test_the_simulation_comes_to_the_exact_means():
    base = Setting(Exponential(1.0), batch_size=6)
    for size, setting in both(base, 3).items():
        result = repeat(setting, 300, 0, lambda batches: None)
        exact = expected(setting)
        assert exact is not None and result.error < 0.05 * exact
        assert result.mean == pytest.approx(exact, abs=4 * result.error), size
        assert result.drawn == pytest.approx(1.0, abs=4 / (300 * 12) ** 0.5)
    assert expected(setting) == pytest.approx(harmonic(12) - harmonic(6), rel=1e-4)
    assert expected(replace(setting, workers=11)) is None


def test_results_by_hand():
    latency = Scripted(*[10, 1, 3, 7], *[8, 4, 8, 4], *[2, 2, 6, 6], *[5, 5, 5, 5])
    told: list[int] = []
    setting = Setting(latency, batch_size=2)
    result = repeat(setting, 4, 0, told.append)
    assert result.seconds.tolist() == [3, 4, 2, 5] and told == [1, 1, 1, 1]
    assert (result.mean, result.kept, result.drawn, result.dropped) == (3.5, 26 / 8, 81 / 16, 2)
    assert result.error == pytest.approx((5 / 3 / 4) ** 0.5)
    assert result.useful == pytest.approx(26 / (4 * 14)) and result.bias == pytest.approx(26 / 8 / (81 / 16))
    lone, groups = (replace(result, seconds=np.array(s)) for s in ([1.0, 3.0], [2.0, 4.0]))
    assert (speed_up(groups, lone).value, speed_up(groups, lone).error) == pytest.approx((1.5, 0.25))


def test_the_first_quarter_of_the_iterations_does_not_count():
    latencies = [9, 9, 9, 9, *[1, 2, 9, 9], *[1, 3, 9, 9], *[1, 4, 9, 9]]
    result = repeat(Setting(Scripted(*latencies, *latencies), batch_size=2), 2, 0, lambda batches: None, iterations=4)
    assert result.seconds.tolist() == [3, 3] and result.kept == 2


# Distributions


def test_the_papers_two_times_are_met():
    found = families()
    for name in ("log-normal", "Pareto", "mixture"):
        latency = found[name]
        times = expected_time(latency, 8, 6, 3), expected_time(latency, 1, 48, 24)
        assert times == pytest.approx((486, 112), rel=1e-6), name
    assert expected_time(found["exponential"], 1, 48, 24) == pytest.approx(112, rel=1e-6)


def test_distributions_have_their_quantiles():
    u = np.array([0.5, 0.8413447460685429])
    assert LogNormal(3.0, 0.5).at(u) == pytest.approx([3.0, 3 * np.exp(0.5)])
    assert Pareto(2.0, 2.0).at(np.array([0.75])) == pytest.approx([4.0])
    assert Exponential(2.0).at(u[:1]) == pytest.approx([2 * np.log(2)])
    mixture = Mixture(Pareto(1.0, 1.0), Pareto(100.0, 1.0), 0.2)
    assert mixture.at(np.array([0.4, 0.9])) == pytest.approx([2.0, 200.0])
    assert Trace((1.0, 2.0, 9.0)).at(np.array([0.1, 0.34, 0.66, 0.67])).tolist() == [1, 2, 2, 9]


def test_a_trace_is_read_from_any_column_file(tmp_path):
    (tmp_path / "a.txt").write_text("3\n1.5\n2\n")
    (tmp_path / "a.csv").write_text("id,seconds\nx,3\ny,1.5\nz,2\n")
    (tmp_path / "a.json").write_text("[3, 1.5, 2]")
    (tmp_path / "b.json").write_text(json.dumps([{"seconds": 3}, {"seconds": 1.5}, {"seconds": 2}]))
    parquet.write_table(table({"id": ["x", "y", "z"], "seconds": [3.0, 1.5, 2.0]}), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        column = "seconds" if path.suffix in (".csv", ".parquet") else None
        assert read_trace(path, column) == Trace((1.5, 2.0, 3.0)), path


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.csv", "id,seconds\n1,2\n", None, r"columns \['id', 'seconds'\] and --column is None; name one"),
        ("a.csv", "id,seconds\n1,2\n", "time", "--column is 'time'"),
        ("a.txt", "1\nfast\n", None, "holds a latency that is no number.*'fast'"),
        ("a.txt", "1\n-2\n", None, "2 latencies from -2.0 to 1.0; it needs positive"),
        ("a.txt", "", None, "holds no latency"),
        ("a.txt", "nan\n1\n", None, "needs positive, finite seconds"),
        ("a.txt", "1\n2\n", "seconds", "has no columns"),
        ("a.json", '{"seconds": [1, 2]}', "seconds", "holds JSON of type dict; it needs a list"),
        ("a.json", "5", None, "holds JSON of type int; it needs a list"),
        ("a.json", '[{"s": 1}, {"t": 2}]', None, r"has no 's' in row 2, which is {'t': 2}; every row needs it"),
        ("a.json", '[{"s": 1}, 2]', "s", "has no 's' in row 2, which is 2; every row needs it"),
        ("a.json", "[{}]", None, r"has the columns \[\] and --column is None"),
        ("a.json", '[1, {"s": 2}]', None, "holds a latency that is no number"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path, name, text, column, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / name, column)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="batch_size is 24 and group_size 5; .*oversampling is 0.5; .*workers is 0"):
        Setting(Exponential(1.0), 5, 24, 0.5, 0, Collection(whole_groups=True))
    with pytest.raises(ValueError, match="group_size is 8 and whole_groups False"):
        Setting(Exponential(1.0), 8)


# The command


def test_the_command_writes_tables_and_figures(tmp_path, monkeypatch, capsys):
    small = {"SIGMAS": (0.5, 1.0), "OVERSAMPLINGS": (1.0, 2.0), "WORKERS": (16,), "ITERATIONS": 4}
    for module in ("simulate_throughput", "simulation.study", "simulation.tables"):
        for name, value in small.items():
            monkeypatch.setattr(sys.modules[module], name, value)
    (tmp_path / "trace.txt").write_text("10\n")  # every request takes as long: nothing is won
    script.main(trace=tmp_path / "trace.txt", repeats=2, output=tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| trace: 1 latencies | 10 ± 0 | 10 ± 0 | 1.00 ± 0.00 | 10.0 | 10.0 | 1.00 | 1.00 |" in text
    assert "| 16 | 20 ± 0 | 20 ± 0 | 1.00 ± 0.00 |" in text
    assert "| 24 of 48, rest dropped | 10 ± 0 | 1.00 | 1.00 | 24.0 | 0.00 | 50% |" in text
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == ["throughput_bias.png", "throughput_speedup.png", "throughput_timeline.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in figures)


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(SystemExit, match="--repeats is 1; a standard error needs at least 2"):
        script.main(repeats=1)
    with pytest.raises(SystemExit, match="No such file"):
        script.main(trace=tmp_path / "none.csv")
    with pytest.raises(SystemExit, match="workers is -1"):
        script.main(workers=-1)
