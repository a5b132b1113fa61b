"""Rollouts: engines that complete prompts, and what collects their completions."""

from spo_lightning.rollouts.transformers_engine import TransformersEngine

__all__ = ["TransformersEngine"]
