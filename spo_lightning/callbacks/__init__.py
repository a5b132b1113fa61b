"""Callbacks of a run: tracker, checkpoints, export, and what the user sees."""

from spo_lightning.callbacks.checkpoint import IterationCheckpoint
from spo_lightning.callbacks.completions_table import CompletionsTable
from spo_lightning.callbacks.export import ExportPolicy
from spo_lightning.callbacks.progress_bar import SPOProgressBar
from spo_lightning.callbacks.run_summary import RunSummary
from spo_lightning.callbacks.tracker_figures import TrackerFigures
from spo_lightning.callbacks.value_tracker import ValueTrackerCallback

__all__ = [
    "CompletionsTable",
    "ExportPolicy",
    "IterationCheckpoint",
    "RunSummary",
    "SPOProgressBar",
    "TrackerFigures",
    "ValueTrackerCallback",
]
