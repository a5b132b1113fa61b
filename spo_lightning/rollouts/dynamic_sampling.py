"""Dynamic sampling: groups without signal are thrown away, others begun in their place (DAPO, arXiv 2503.14476, §3.2).

Nothing here depends on an engine: a round is collected as a batch of its own, and every rank knows all its grades, so
that all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spo_lightning.errors import ConfigError
from spo_lightning.rollouts.batch_collector import CollectedBatch
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.types import PromptBatch, RolloutTask


def informative(group: Sequence[Rollout]) -> bool:
    """Whether the decided rewards of a group differ: others give every completion an advantage of 0."""
    return len({rollout.grade.value for rollout in group if rollout.grade.decided}) > 1


def collect_informative(batch: PromptBatch, collect: Callable[[list[RolloutTask]], CollectedBatch]) -> CollectedBatch:
    """Begin groups round after round until a batch of informative ones is there, or all that were drawn have begun.

    A round begins as many groups as are missing, so that no informative group is ever thrown away. All rounds are
    sampled by the same weights.

    Args:
        batch: more prompts than it has room for.
        collect: begins some tasks, waits for all of them, and grades them; the same on every rank.

    Returns:
        All that was generated, in the order of the draw, with the rows of uninformative groups as ``discarded``. Tasks
        that never began are ``dropped``.
    """
    waiting, copies = batch.tasks, batch.copies
    wanted, kept = batch.size // copies, 0
    rounds: list[CollectedBatch] = []
    while waiting and kept < wanted:
        count = (wanted - kept) * copies
        begun, waiting = waiting[:count], waiting[count:]
        rounds.append(collect(begun))
        kept += sum(informative(group) for group in _groups(rounds[-1].rollouts, copies))
    rollouts = [rollout for part in rounds for rollout in part.rollouts]
    discarded = frozenset(
        number * copies + copy
        for number, group in enumerate(_groups(rollouts, copies))
        if not informative(group)
        for copy in range(copies)
    )
    metrics = {
        "collection/rounds": float(len(rounds)),
        "collection/missing_groups": float(wanted - kept),
        "collection/discarded_completions": float(len(discarded)),
        "collection/discarded_tokens": float(sum(rollouts[row].completion.num_sampled for row in discarded)),
    }
    rewards = [r.grade.value for row, r in enumerate(rollouts) if row not in discarded and r.grade.value is not None]
    if rewards:
        metrics["collection/kept_reward_mean"] = sum(rewards) / len(rewards)
    return CollectedBatch([task for part in rounds for task in part.tasks], rollouts, waiting, metrics, discarded)


def check_dynamic_sampling(settings: Collection, copies: int, oversampling: float) -> None:
    """Refuse what gives dynamic sampling nothing to do.

    Args:
        settings: of the run.
        copies: ``data.completions_per_prompt``.
        oversampling: ``data.oversampling``.

    Raises:
        ConfigError: there are no groups, or no prompts for a second round.
    """
    if not settings.dynamic_sampling:
        return
    if copies < 2:
        raise ConfigError(
            f"model.collection.dynamic_sampling compares the completions of a prompt, and data.completions_per_prompt "
            f"is {copies}; set it to at least 2"
        )
    if oversampling == 1:
        raise ConfigError(
            "model.collection.dynamic_sampling begins further prompts of a draw in place of those without signal, and "
            "data.oversampling is 1, which draws no further ones; raise it, to 3 for example"
        )


def _groups(rollouts: Sequence[Rollout], copies: int) -> list[Sequence[Rollout]]:
    return [rollouts[start : start + copies] for start in range(0, len(rollouts), copies)]
