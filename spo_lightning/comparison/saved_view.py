"""A saved view of MLflow's UI: the compared runs' curves, one for each entrant.

MLflow's own group-by draws the mean of the runs that share a tag or parameter, with a shade from the least to the
greatest. It is a setting of the browser, and the charts of an experiment whose seeds are folded under parents are empty
without it. A saved view is that setting, kept as a tag of the experiment, where the UI's menu *Views* finds it.
"""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from mlflow import MlflowClient

from spo_lightning.comparison.contest import Contest
from spo_lightning.comparison.training_run import REWARD

VIEW_TAG = "mlflow.sharedViewState."  # MLflow's prefix of tags that hold a view
SECTION = "spo-comparison"
MAX_KEY_LENGTH = 200  # with the prefix below MLflow's 250


@dataclass(frozen=True)
class SavedView:
    """A view that MLflow's UI offers.

    Attributes:
        experiment_id: MLflow's id of the experiment that has it.
        name: what the menu *Views* calls it.
        key: its id within the experiment: the same for the same tag or parameter, so that a later one replaces it.
        state: what MLflow's UI takes over; what is not in it stays at the UI's default.
    """

    experiment_id: str
    name: str
    key: str
    state: dict[str, Any]

    @property
    def place(self) -> str:
        """Where a server shows the view's charts: the address after the server's own."""
        query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": self.key}
        return f"#/experiments/{self.experiment_id}/runs?{urlencode(query)}"


def make_view(contest: Contest) -> SavedView:
    """The view of a comparison: runs grouped by ``contest.by``, validation and reward before all other curves.

    It shows the runs of the experiment that have the tag or parameter, and are finished if all compared ones are;
    otherwise those that did not fail.
    """
    kind = "tag" if contest.by in contest.runs[0].tags else "param"
    status = "= 'FINISHED'" if all(run.status == "FINISHED" for run in contest.runs) else "!= 'FAILED'"
    metrics = _metrics(contest)
    state = {
        "searchFilter": f"attributes.status {status} and {kind}s.`{contest.by}` != ''",
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": kind, "groupByData": contest.by}],
        },
        "selectedColumns": ["tags.`seed`", *(f"metrics.`{metric}`" for metric in metrics[:2])],
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # otherwise sections are put in the order of the alphabet
        "compareRunSections": [{"uuid": SECTION, "name": "Comparison", "display": True, "isReordered": True}],
        "compareRunCharts": [_chart(metric) for metric in metrics],
    }
    key = "spo-by-" + re.sub(r"[^\w.\-]+", "-", contest.by)[-MAX_KEY_LENGTH:]
    return SavedView(contest.runs[0].experiment_id, f"by {contest.by}", key, state)


def save_view(client: MlflowClient, view: SavedView) -> None:
    """Put a view into its experiment, in the place of an earlier one with its key."""
    packed = base64.b64encode(zlib.compress(json.dumps(view.state).encode())).decode()
    content = {"name": view.name, "createdAt": int(time.time() * 1000), "state": f"deflate;{packed}"}
    client.set_experiment_tag(view.experiment_id, f"{VIEW_TAG}{view.key}", json.dumps(content))


def _metrics(contest: Contest) -> list[str]:
    if contest.benchmark is None:
        return [REWARD]
    benchmark = contest.benchmark
    largest = [] if benchmark.largest_k is None else [f"val/{benchmark.name}/pass_at_{benchmark.largest_k}"]
    return [benchmark.average, REWARD, benchmark.majority, *largest]


def _chart(metric: str) -> dict[str, Any]:
    """A chart by iteration. MLflow smooths its lines unless told otherwise, and leaves the shade as it is."""
    return {
        "uuid": f"spo-{metric}",
        "type": "LINE",
        "metricSectionId": SECTION,
        "metricKey": metric,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "useGlobalLineSmoothing": True,
        "useGlobalXaxisKey": True,
    }
