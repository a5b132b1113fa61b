"""Logs a comparison to MLflow, as a run of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient

from spo_lightning.comparison.contest import Contest
from spo_lightning.comparison.store import COMPARISON_TAG

IDS_OF_A_PARAM = 150  # 33 characters each, and a parameter holds 6,000


def publish(client: MlflowClient, contest: Contest, files: Sequence[Path]) -> str:
    """Make a comparison run in the experiment of the first run, with the files as artifacts and the runs' ids.

    Args:
        client: where to.
        contest: what was compared.
        files: to log.

    Returns:
        The run's id.
    """
    name = f"comparison-{time.strftime('%Y%m%d-%H%M%S')}"
    run = client.create_run(contest.runs[0].experiment_id, tags={COMPARISON_TAG: "true"}, run_name=name)
    run_id = run.info.run_id
    status = "FAILED"
    try:
        client.log_param(run_id, "by", contest.by)
        ids = [each.id for each in contest.runs]
        for start in range(0, len(ids), IDS_OF_A_PARAM):
            client.log_param(run_id, f"runs/{start}", ",".join(ids[start : start + IDS_OF_A_PARAM]))
        for file in files:
            client.log_artifact(run_id, str(file))
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return run_id
