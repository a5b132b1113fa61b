"""spo compare on a real MLflow store: which runs count, the page, and what is logged."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from spo_lightning import compare_command
from spo_lightning.comparison import report as reports
from spo_lightning.comparison.contest import make_contest
from spo_lightning.comparison.page import differing_params, render
from spo_lightning.comparison.report import PICTURES, Report, write_report
from spo_lightning.comparison.saved_view import make_view, save_view
from spo_lightning.comparison.store import connect, read, runs_of, runs_with, sift
from spo_lightning.comparison.table import make_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIFTHS = tuple(f"curriculum/value_{i / 5:.1f}_{(i + 1) / 5:.1f}" for i in range(5))
ITERATIONS = 4
ODD = "a$_$<b>"  # an entrant's name that TeX and HTML would both take for theirs


def log_run(
    client: MlflowClient, experiment: str, algorithm: str, seed: int, reward: float, status: str = "FINISHED"
) -> str:
    """A training run whose rewards end in ``reward`` and whose last validation is a tenth above."""
    tags = {"algorithm": algorithm, "seed": str(seed)}
    run_id = client.create_run(experiment, tags=tags, run_name=f"{algorithm}, seed {seed}").info.run_id
    metrics = []
    for step in range(ITERATIONS):
        values = {
            "reward/mean": reward * (step + 1) / ITERATIONS,
            "progress/completions": 8.0 * (step + 1),
            "progress/tokens": (100.0 + seed) * (step + 1),
            "timing/iteration_s": 1.0 + seed,
            "signal/reward_variance": 0.25,
            **dict.fromkeys(FIFTHS, 0.2),
        }
        if step % 2:
            values |= {f"val/sums/{name}": reward + 0.1 for name in ("avg_at_2", "maj_at_2", "pass_at_1", "pass_at_2")}
        metrics += [Metric(name, value, 1000 + step, step) for name, value in values.items()]
    params = [Param("model/lr", "1e-6" if algorithm == "spo" else "1e-5"), Param("seed_everything", str(seed))]
    params.append(Param("trainer/default_root_dir", f"runs/{algorithm}"))
    client.log_batch(run_id, metrics, params, [RunTag("engine", "TransformersEngine")])
    if status != "RUNNING":
        client.set_terminated(run_id, status)
    return run_id


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data base with the experiment "trial": spo and grpo with two seeds each, and what must not count."""
    folder = tmp_path_factory.mktemp("mlflow")
    database = folder / "mlflow.db"
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.create_experiment("trial", artifact_location=(folder / "artifacts").as_uri())
    for algorithm, rewards in (("grpo", (0.5, 0.6)), ("spo", (0.7, 0.9))):
        for seed, reward in enumerate(rewards):
            log_run(client, experiment, algorithm, seed, reward)
    log_run(client, experiment, "spo", 2, 0.1, status="RUNNING")
    log_run(client, experiment, "spo", 3, 0.1, status="FAILED")
    for tags in ({"spo.group": "spo"}, {"spo.comparison": "true"}):
        client.set_terminated(client.create_run(experiment, tags=tags, run_name="no training").info.run_id)
    tested = client.create_run(experiment, run_name="only tested").info.run_id
    client.log_metric(tested, "test/sums/avg_at_2", 0.5)
    client.set_terminated(tested)
    client.create_experiment("empty")
    return database


@pytest.fixture
def uri(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the data base in a folder of its own, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(filled, tmp_path / "copy.db")
    return f"sqlite:///{tmp_path / 'copy.db'}"


@pytest.fixture(scope="module")
def report(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """All of the report, with ``ODD`` for "grpo"."""
    client = connect(f"sqlite:///{filled}")
    kept, left_out = sift(runs_of(client, "trial"), include_unfinished=False)
    runs = [
        run if run.tags["algorithm"] == "spo" else replace(run, tags={**run.tags, "algorithm": ODD})
        for run in read(client, kept, int)
    ]
    contest = make_contest(runs, left_out=left_out)
    return write_report(contest, tmp_path_factory.mktemp("report"), "sqlite:///mlflow.db")


def only_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one figure, for time's sake."""
    monkeypatch.setattr(reports, "PICTURES", [each for each in PICTURES if each.name == "differences"])


def test_only_finished_training_runs_count(uri: str) -> None:
    client = connect(uri)
    kept, left_out = sift(runs_of(client, "trial"), include_unfinished=False)
    assert sorted(run.info.run_name for run in kept) == ["grpo, seed 0", "grpo, seed 1", "spo, seed 0", "spo, seed 1"]
    reasons = {each.run.split("'")[1]: each.reason for each in left_out}
    assert reasons == {
        "spo, seed 2": "its status is RUNNING; --include_unfinished takes it in",
        "spo, seed 3": "it failed",
        "only tested": "it has no metric reward/mean, progress/completions, progress/tokens, timing/iteration_s: "
        "not a training run, or one of an older version",
    }
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=True)
    assert "spo, seed 2" in [run.info.run_name for run in kept]
    assert "spo, seed 3" not in [run.info.run_name for run in kept]


def test_runs_named_by_id_say_why_they_do_not_count(uri: str) -> None:
    client = connect(uri)
    runs = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    parent, comparison = (
        next(run.info.run_id for run in runs if tag in run.data.tags) for tag in ("spo.group", "spo.comparison")
    )
    good = next(run.info.run_id for run in runs if run.data.tags.get("algorithm") == "grpo")
    deleted = next(run.info.run_id for run in runs if run.data.tags.get("algorithm") == "spo")
    client.delete_run(deleted)
    kept, left_out = sift(runs_with(client, [parent, good, comparison, deleted, good]), include_unfinished=False)
    assert [run.info.run_id for run in kept] == [good]
    reasons = ["it is the parent of a group; give the runs under it", "it is a comparison", "it was deleted"]
    assert [each.reason for each in left_out] == reasons


def test_an_iteration_done_again_counts_once_and_the_last_time(uri: str) -> None:
    client = connect(uri)
    (run, *_), _ = sift(runs_of(client, "trial"), include_unfinished=False)
    client.log_metric(run.info.run_id, "reward/mean", 0.123, timestamp=2000, step=2)
    (found,) = read(client, [run], int)
    assert found.curves["reward/mean"].steps.tolist() == [0, 1, 2, 3]
    assert found.curves["reward/mean"].values[2] == 0.123
    assert found.experiment == "trial"
    assert found.progress()["hours"].values * 3600 == pytest.approx([1, 2, 3, 4])


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["spo", "compare", *arguments])
    compare_command.run()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either an experiment, as in `spo compare study`, or ids of runs"),
        (("trial", "--runs", "abc"), "give either an experiment"),
        (("trail",), "no experiment 'trail'; did you mean 'trial'? there are: Default, empty, trial"),
        (("--runs", "abc"), "--runs holds 'abc', which is no run of this store"),
        (("empty",), "of 0 runs none is a finished training run"),
        (("trial", "--tracking_uri", "sqlite:///none.db"), "but there is no file"),
        (("trial", "--tracking_uri", "none.db"), "tracking_uri is 'none.db'; it must be a URI"),
        (("trial", "--tracking_uri", "10.0.0.5:5000"), "tracking_uri is '10.0.0.5:5000'; it must be a URI"),
    ],
)
def test_mistakes_end_with_a_remedy(
    uri: str,
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SystemExit) as stopped:
        compare(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not Path("none.db").exists()
    assert not Path("runs").exists()


def test_every_place_that_the_logger_takes_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spo_lightning.comparison.store.MlflowClient", lambda uri: uri)
    assert connect("databricks") == "databricks"  # type: ignore[comparison-overlap]


def saved_views(client: MlflowClient, experiment_id: str) -> dict[str, Any]:
    """What MLflow's UI would read: states by name."""
    tags = client.get_experiment(experiment_id).tags
    views = [json.loads(text) for name, text in tags.items() if name.startswith("mlflow.sharedViewState.")]
    packed = {view["name"]: view["state"].removeprefix("deflate;") for view in views}
    return {name: json.loads(zlib.decompress(base64.b64decode(text))) for name, text in packed.items()}


def found_by(client: MlflowClient, experiment_id: str, view: Mapping[str, Any]) -> list[str]:
    return sorted(run.info.run_name for run in client.search_runs([experiment_id], view["searchFilter"]))


def test_saved_view_groups_the_compared_runs(uri: str) -> None:
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=False)
    runs = read(client, kept, int)
    experiment = runs[0].experiment_id
    for by in ("algorithm", "algorithm", "model/lr"):
        save_view(client, make_view(make_contest(runs, by)))
    views = saved_views(client, experiment)
    assert sorted(views) == ["by algorithm", "by model/lr"]
    grouped = {name: view["groupBy"] for name, view in views.items()}
    assert grouped == {
        f"by {by}": {"aggregateFunction": "average", "groupByKeys": [{"mode": mode, "groupByData": by}]}
        for mode, by in (("tag", "algorithm"), ("param", "model/lr"))
    }
    view = views["by algorithm"]
    assert found_by(client, experiment, view) == ["grpo, seed 0", "grpo, seed 1", "spo, seed 0", "spo, seed 1"]
    assert found_by(client, experiment, views["by model/lr"]) == found_by(client, experiment, view)
    charts = [chart["metricKey"] for chart in view["compareRunCharts"]]
    assert charts == ["val/sums/avg_at_2", "reward/mean", "val/sums/maj_at_2", "val/sums/pass_at_2"]
    assert all(set(charts) <= set(run.data.metrics) for run in kept)
    assert view["compareRunCharts"][0] == {
        "uuid": "spo-val/sums/avg_at_2",
        "type": "LINE",
        "metricSectionId": "spo-comparison",
        "metricKey": "val/sums/avg_at_2",
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "useGlobalLineSmoothing": True,
        "useGlobalXaxisKey": True,
    }
    (section,) = view["compareRunSections"]
    assert section == {"uuid": "spo-comparison", "name": "Comparison", "display": True, "isReordered": True}
    assert (view["runsHiddenMode"], view["isAccordionReordered"]) == ("SHOW_ALL", True)
    assert view["selectedColumns"] == ["tags.`seed`", "metrics.`val/sums/avg_at_2`", "metrics.`reward/mean`"]


def test_mlflow_s_ui_knows_what_a_saved_view_says(uri: str) -> None:
    """Views are not documented for programs: here is seen when MLflow gives their parts other names."""
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=False)
    state = make_view(make_contest(read(client, kept, int))).state
    scripts = sorted((Path(mlflow.__file__).parent / "server/js/build/static/js").glob("*.js"))
    ui = "".join(script.read_text(encoding="utf-8") for script in scripts)
    parts = {"sharedViewState.", "viewStateShareKey", "compareRunsMode", "SHOW_ALL", *state, *state["groupBy"]}
    parts |= {*state["compareRunCharts"][0], *state["compareRunSections"][0], "groupByData"}
    assert [part for part in sorted(parts) if part not in ui] == []


def test_saved_view_of_runs_that_go_on_and_have_no_benchmark(uri: str) -> None:
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=True)
    contest = replace(make_contest(read(client, kept, int)), benchmark=None)
    view = make_view(contest)
    assert [chart["metricKey"] for chart in view.state["compareRunCharts"]] == ["reward/mean"]
    names = ["grpo, seed 0", "grpo, seed 1", "spo, seed 0", "spo, seed 1", "spo, seed 2"]
    assert found_by(client, view.experiment_id, view.state) == names  # without seed 3, which failed
    save_view(client, make_view(replace(contest, by="a/long name " * 20)))  # MLflow refuses names above 250 characters
    assert list(saved_views(client, view.experiment_id)) == ["by " + "a/long name " * 20]


def test_end_to_end(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder = Path("runs/comparison/trial")
    only_differences(monkeypatch)
    written = {"table.md", "table.csv", "index.html", "differences.png"}
    for _ in range(2):  # the second time there is a comparison run, which must not count
        compare(monkeypatch, "trial")
        printed = capsys.readouterr().out
        assert "| spo | 2 | 0.800 ± 1.271 | 0.900 ± 1.271 |" in printed  # t(1) · 0.1414 / √2
        assert "| grpo | 2 | -0.250 ± 0.635 |" in printed
        assert re.search(r"left out: 'spo, seed 3' \(\w+\): it failed", printed)
        assert "page: runs/comparison/trial/index.html" in printed
        assert {path.name for path in folder.iterdir()} == written
    client = MlflowClient(uri)
    run_id = re.search(r"logged to MLflow: run (\w+) of 'trial'", printed)[1]  # type: ignore[index]
    run = client.get_run(run_id)
    assert run.info.run_name.startswith("comparison-")
    assert run.info.status == "FINISHED"
    assert run.data.tags["spo.comparison"] == "true"
    compared = run.data.params["runs/0"].split(",")
    assert {client.get_run(each).data.tags["algorithm"] for each in compared} == {"spo", "grpo"}
    assert len(compared) == 4
    assert {artifact.path for artifact in client.list_artifacts(run_id)} == written
    address = f"#/experiments/{run.info.experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    assert f"curves in MLflow's UI: http://127.0.0.1:5000/{address}&viewStateShareKey=spo-by-algorithm" in printed
    before, tags = len(client.search_runs([run.info.experiment_id])), client.get_experiment(run.info.experiment_id).tags
    compare(monkeypatch, "--no_log", "--output", "elsewhere", "--runs", *compared[:2])
    assert Path("elsewhere/index.html").is_file()
    assert not Path("elsewhere/differences.png").exists()
    assert "no figure: Differences to the reference: there is no reference" in capsys.readouterr().out
    assert len(client.search_runs([run.info.experiment_id])) == before
    assert list(saved_views(client, run.info.experiment_id)) == ["by algorithm"]
    assert client.get_experiment(run.info.experiment_id).tags == tags


def test_a_figure_that_there_is_no_more_is_removed(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_differences(monkeypatch)
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=False)
    runs = read(client, kept, int)
    assert write_report(make_contest(runs), tmp_path / "out", "x").files[2] == tmp_path / "out" / "differences.png"
    assert (tmp_path / "out" / "differences.png").exists()
    alone = write_report(make_contest([run for run in runs if run.tags["algorithm"] == "grpo"]), tmp_path / "out", "x")
    assert not (tmp_path / "out" / "differences.png").exists()
    assert alone.missing == [
        "Differences to the reference: there is no reference, or no seed that it shares with another"
    ]


class PageReader(HTMLParser):
    """Checks that tags close in order, and keeps what a browser would load and what a reader sees."""

    VOID = ("meta", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        if tag == "a":
            self.links.append(found["href"] or "")
        elif "src" in found or "href" in found:
            self.loads.append(found.get("src") or found.get("href") or "")
        if tag == "img":
            self.images.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def test_page_holds_everything_itself(report: Report) -> None:
    html = report.page.read_text()
    page = PageReader(html)
    assert {file.name for file in report.files[2:-1]} == {f"{each.name}.png" for each in PICTURES}
    assert html.startswith("<!DOCTYPE html>")
    assert len(page.images) == len(PICTURES)
    assert all(address.startswith("data:") for address in page.loads)
    assert "@import" not in html and "url(" not in html
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for image in page.images:
        content = base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"), validate=True)
        width, height = struct.unpack(">II", content[16:24])
        assert float(image["width"] or 0) / float(image["height"] or 1) == pytest.approx(width / height, rel=0.01)
    assert "0.800 ± 1.271" in page.text
    assert "seconds" in page.text and "hours" not in page.text
    assert "'spo, seed 3'" in page.text and "it failed" in page.text
    assert ODD in page.text and ODD not in html and "<b>" not in html


def test_page_links_runs_of_a_server_and_escapes_names(uri: str) -> None:
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=False)
    runs = [replace(run, name="<b>&bold") for run in read(client, kept, int)]
    contest = make_contest(runs)
    page = PageReader(render(contest, make_table(contest), {}, [], "http://host:5000/"))
    link = f"http://host:5000/#/experiments/{runs[0].experiment_id}/runs/{runs[0].id}?workflowType=machine_learning"
    assert link in page.links
    assert page.text.count("<b>&bold") == 4
    assert all(address.startswith("data:") for address in page.loads)


def test_start_completions_are_read(uri: str) -> None:
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=False)
    client.log_metric(kept[0].info.run_id, "progress/start_completions", 64.0, step=0)
    first, second = read(client, [client.get_run(run.info.run_id) for run in kept[:2]], int)
    assert (first.start_completions, second.start_completions) == (64, 0)


def test_parameters_that_tell_entrants_apart(uri: str) -> None:
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=False)
    header, cells = differing_params(make_contest(read(client, kept, int)))
    assert header == ["parameter", "spo", "grpo"]
    assert cells == [["model/lr", "1e-6", "1e-5"]]  # not the seed, which both have alike, nor the folder


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path], tuple[str, str]]:
    """Opens a page in Chromium without a window; returns the document it made and what it complained about."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the page with")

    def open_page(path: Path) -> tuple[str, str]:
        quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0")
        line = [CHROMIUM, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, "\n".join(row for row in done.stderr.splitlines() if "CONSOLE" in row)

    return open_page


def test_page_in_a_browser(report: Report, browse: Callable[[Path], tuple[str, str]]) -> None:
    html = report.page.read_text()
    click = """<script>
    const rows = () => [...document.querySelectorAll("#means tbody tr")].map(row => row.cells[0].textContent);
    const button = document.querySelectorAll("#means th button")[2], seen = [rows()];
    for (let i = 0; i < 2; i++) { button.click(); seen.push(rows()); }
    document.title = JSON.stringify(seen);
    </script></body>"""
    tried = report.page.with_name("tried.html")
    tried.write_text(html.replace("</body>", click))
    document, complaints = browse(tried)
    assert complaints == ""
    (title,) = re.findall("<title>(.*)</title>", document)
    assert json.loads(unescape(title)) == [["spo", ODD], ["spo", ODD], [ODD, "spo"]]
    assert document.count("<img") == len(PICTURES)


def test_page_in_a_sandboxed_frame(uri: str, tmp_path: Path, browse: Callable[[Path], tuple[str, str]]) -> None:
    """As MLflow's viewer shows it: a blob in a frame that may run scripts and nothing else."""
    client = connect(uri)
    kept, _ = sift(runs_of(client, "trial"), include_unfinished=False)
    contest = make_contest(read(client, kept, int))
    click = """<script>
    document.body.style.minHeight = "9000px";
    document.querySelector('nav a[href="#runs"]').click();
    const top_of_runs = Math.round(document.querySelector("#runs").getBoundingClientRect().top);
    const links = document.querySelectorAll("td a"), followed = document.querySelectorAll("td a[href]");
    parent.postMessage([top_of_runs, scrollY > 0, links.length, followed.length], "*");
    </script></body>"""
    html = render(contest, make_table(contest), {}, [], "http://host:5000").replace("</body>", click)
    frame = """<!DOCTYPE html><title>no answer</title><iframe sandbox="allow-scripts"></iframe><script>
    addEventListener("message", event => { document.title = JSON.stringify(event.data); });
    const blob = new Blob([HTML], {type: "text/html"});
    document.querySelector("iframe").src = URL.createObjectURL(blob);
    </script>"""
    outer = tmp_path / "frame.html"
    outer.write_text(frame.replace("HTML", json.dumps(html).replace("</", "<\\/"), 1))
    document, complaints = browse(outer)
    assert complaints == ""
    assert re.findall("<title>(.*?)</title>", document)[0] == "[0,true,4,0]"


def test_browser_check_would_notice(tmp_path: Path, browse: Callable[[Path], tuple[str, str]]) -> None:
    (tmp_path / "bad.html").write_text("<!DOCTYPE html><title>bad</title><script>missing()</script>")
    assert "missing is not defined" in browse(tmp_path / "bad.html")[1]
