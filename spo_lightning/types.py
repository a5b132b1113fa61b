"""The values that travel through one iteration, as frozen dataclasses.

Shape notation, used all over the project: ``B`` prompts of a batch, ``N`` completions, ``T`` tokens, ``V`` vocabulary,
``M`` prompts of the data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spo_lightning.errors import below, raise_problems

FinishReason = Literal["stop", "length", "aborted"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt data set.

    Attributes:
        index: position in the loaded data set; the row of the value tracker and of the completion history.
        id: stable name of the prompt; survives a reordering of the file.
        text: the problem as the data set gives it, before chat template and instruction.
        token_ids: what the model sees, template and instruction applied.
        reference: the gold answer.
    """

    index: int
    id: str
    text: str
    token_ids: tuple[int, ...]
    reference: str


@dataclass(frozen=True)  # no slots: jsonargparse reads the default instances of configurable classes
class SamplingParams:
    """How completions are sampled.

    The defaults are the paper's training settings, but for 8,192 tokens, which are the public recipe's; the paper's are
    16,384.

    Attributes:
        max_tokens: most tokens sampled for one completion.
        temperature: divides the logits; 0 means greedy.
        top_p: nucleus mass kept, in (0, 1].
        top_k: number of most likely tokens kept; 0 switches it off.
        stop: strings that end a completion once it holds one of them; the string stays in the completion.
    """

    max_tokens: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        problems = below(1, max_tokens=self.max_tokens)
        if self.temperature < 0:
            problems.append(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; it must be in (0, 1], 1 switches it off")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}; it must be 0 (off) or positive")
        if any(not s for s in self.stop):
            problems.append("stop holds an empty string, which would end every completion at once; remove it")
        raise_problems("bad sampling parameters", problems)


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What an engine gives back for one request.

    Attributes:
        request_id: as submitted.
        prompt_token_ids: as submitted.
        token_ids: (T,) int64, the completion; the end-of-sequence token is included when it was sampled.
        sampling_logprobs: (T,) float32, log-probability of each sampled token under the distribution it was really
            drawn from (after temperature, top-k and top-p); 0 where ``completion_mask`` is False.
        completion_mask: (T,) bool, True where the policy sampled the token, False where a tool forced it. Born with the
            token, never inferred from an id.
        policy_versions: (T,) int64, version of the weights that sampled each token (what ``update_weights`` was told).
        text: decoded completion without special tokens; empty when it was "aborted".
        finish_reason: "stop" (end-of-sequence token or stop string), "length" (``max_tokens``, or a limit of tool use)
            or "aborted".
        sampled_text: as ``text``, of the sampled tokens alone; ``None`` when it is the same.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    token_ids: Tensor
    sampling_logprobs: Tensor
    completion_mask: Tensor
    policy_versions: Tensor
    text: str
    finish_reason: FinishReason
    sampled_text: str | None = None

    def __post_init__(self) -> None:
        shape = self.token_ids.shape
        for name in ("sampling_logprobs", "completion_mask", "policy_versions"):
            other = getattr(self, name).shape
            if other != shape:
                raise ValueError(f"{name} has shape {tuple(other)}, token_ids {tuple(shape)}; they must be equal")

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled, the ``L_i`` of SPO++ eq. 6."""
        return int(self.completion_mask.sum())

    @property
    def first_version(self) -> int:
        """Version of the weights that sampled the first token; the oldest one."""
        return int(self.policy_versions[0])


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One completion asked of an engine.

    Attributes:
        request_id: unique among the engine's open requests.
        prompt_token_ids: the context to continue; not empty.
        sampling: how to sample.
        seed: decides the completion, alone or in any batch; 0 or more.
        partial: what an earlier request for the same prompt has so far; this one goes on after its last token and
            gives back both parts as one completion. ``sampling.max_tokens`` bounds the sampled tokens of both together.
        urgent: goes before others that wait in an engine's queue.
        use_tools: whether it may call the tools that the run has.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    partial: Completion | None = None
    urgent: bool = False
    use_tools: bool = True


@dataclass(frozen=True, slots=True)
class Grade:
    """Verdict of a reward on one completion.

    Attributes:
        value: the reward; ``None`` means undecided (the grader timed out or died): no gradient, no tracker update.
        answer: the answer found in the completion, as text; ``None`` when there is none.
        cause: why it is undecided ("timeout", "crash"); empty when decided.
        parts: what else the reward tells of the completion, such as ``{"format": 1.0}``: logged as means,
            ``reward/format``, and not learned from.
    """

    value: float | None
    answer: str | None = None
    cause: str = ""
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def decided(self) -> bool:
        """True when the reward may be learned from."""
        return self.value is not None


@dataclass(frozen=True, slots=True, eq=False)
class StoredCompletion:
    """The leading part of a prompt's last completion, kept to measure drift when the prompt comes up again.

    Attributes:
        token_ids: (T,) int32, cut after the last of the kept sampled tokens.
        completion_mask: (T,) bool, True where the policy sampled the token.
        logprobs: (S,) float32, S = number of True in the mask: log-probability of each sampled token under the policy
            that learned from the completion, before it did. An older one may have sampled what was carried over. With
            ``old_logprobs: engine``, and of what was discarded, they are the engine's.
    """

    token_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor

    def __post_init__(self) -> None:
        sampled = int(self.completion_mask.sum())
        if self.token_ids.shape != self.completion_mask.shape or self.logprobs.shape != (sampled,):
            raise ValueError(
                f"stored completion does not fit together: {tuple(self.token_ids.shape)} tokens, mask "
                f"{tuple(self.completion_mask.shape)} with {sampled} sampled, {tuple(self.logprobs.shape)} logprobs"
            )


@dataclass(frozen=True, slots=True)
class RolloutTask:
    """One completion that the run has asked for, with what was frozen when it was.

    Attributes:
        prompt: to be completed.
        baseline: the tracker's value of the prompt then (SPO eq. 8).
        iteration: that drew it.
        row: its place in that draw; with ``iteration`` it names the task and decides its seed.
        group: number, within the draw, of the copies of one prompt that it belongs to.
    """

    prompt: Prompt
    baseline: float
    iteration: int
    row: int
    group: int

    @property
    def key(self) -> tuple[int, int]:
        """Name of the task; tasks in the order of their keys are in the order they were drawn."""
        return self.iteration, self.row


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """The prompts drawn for one iteration, with everything that was frozen when they were drawn.

    Attributes:
        iteration: 0-based number of the iteration.
        size: completions that the iteration learns from, B; of these prompts and of those drawn before.
        copies: completions of each prompt.
        prompts: N prompts to begin, the copies of each one after the other; a prompt may be drawn more than once.
        baseline: (N,) float64, the tracker's value before any reward of this iteration (SPO eq. 8).
        previous: prompt index to the stored last completion, of every prompt that has a request open, these included;
            prompts on their first visit have none.
    """

    iteration: int
    size: int
    copies: int
    prompts: tuple[Prompt, ...]
    baseline: Tensor
    previous: Mapping[int, StoredCompletion]

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if self.baseline.shape != (n,) or self.baseline.dtype != torch.float64:
            raise ValueError(
                f"{n} prompts need a float64 baseline of shape ({n},); got {self.baseline.dtype} "
                f"{tuple(self.baseline.shape)}"
            )

    @property
    def tasks(self) -> list[RolloutTask]:
        """What is to begin."""
        pairs = zip(self.prompts, self.baseline.tolist(), strict=True)
        return [
            RolloutTask(prompt, value, self.iteration, row, row // self.copies)
            for row, (prompt, value) in enumerate(pairs)
        ]


@dataclass(frozen=True, slots=True)
class BenchmarkBatch:
    """Problems of one benchmark for validation or test, each to be answered ``num_samples`` times.

    Attributes:
        benchmark: its name, the middle part of the metric keys.
        prompts: the problems; ``index`` counts within the benchmark.
        num_samples: completions per problem.
    """

    benchmark: str
    prompts: tuple[Prompt, ...]
    num_samples: int


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one iteration teaches about its prompts, undecided completions left out; ``training_step`` returns it.

    Attributes:
        index: (N,) int64, ``Prompt.index``; repeats allowed.
        reward: (N,) float64.
        drift: (N,) float64, D(x) since the prompt's last visit; 0 on the first (SPO §4.1).
        version: (N,) int64, of the policy that sampled the completion's first token.
        completions: N stored completions, the prompts' new history.
        ended: (E,) int64, ``Prompt.index`` of every request that is no longer open: learned from, undecided or dropped.
    """

    index: Tensor
    reward: Tensor
    drift: Tensor
    version: Tensor
    completions: tuple[StoredCompletion, ...]
    ended: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.index, self.reward, self.drift, self.version)}
        if shapes != {(len(self.completions),)}:
            raise ValueError(
                f"index {tuple(self.index.shape)}, reward {tuple(self.reward.shape)}, drift {tuple(self.drift.shape)}, "
                f"version {tuple(self.version.shape)} and {len(self.completions)} completions must have one entry a "
                "completion"
            )


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """One row of the completions table.

    ``reward`` and ``advantage`` are ``None`` when the grader could not decide.
    """

    iteration: int
    prompt_id: str
    prompt: str
    completion: str
    answer: str | None
    reference: str
    reward: float | None
    baseline: float
    advantage: float | None
    num_tokens: int
    finish_reason: FinishReason
