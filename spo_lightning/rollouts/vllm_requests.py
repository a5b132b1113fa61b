"""The open requests of a vLLM engine: how they go in, what comes out, and how they leave in between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.request_checks import ids_to_abort
from spo_lightning.types import Completion, FinishReason, RolloutRequest

TEMPERATURES = 0.01, 2.0


class VLLMRequests:
    """Open requests, in the order of submission. vLLM holds some; the others wait to go in.

    ``llm`` is the ``vllm.LLMEngine`` throughout.

    Attributes:
        version: of the weights that sample; recorded with every token.
    """

    def __init__(self) -> None:
        self.version = 0
        self._open: dict[int, OpenRequest] = {}
        self._held: dict[str, OpenRequest] = {}  # by vLLM's name; a request that goes in again gets a new one
        self._next_name = 0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._open

    def add(self, row: OpenRequest) -> None:
        """Open a request; it waits."""
        self._open[row.request.request_id] = row

    def enter(self, llm: Any) -> None:
        """Hand the waiting requests to vLLM, each with the tokens it has as part of its prompt."""
        if len(self._held) == len(self._open):
            return
        held = set(self._held.values())
        for row in [row for row in self._open.values() if row not in held]:
            name = str(self._next_name)
            self._next_name += 1
            llm.add_request(name, {"prompt_token_ids": row.prefix}, sampling_params(row))
            self._held[name] = row

    def leave(self, llm: Any) -> None:
        """Take all requests out of vLLM; they wait to go in again."""
        self._withdraw(llm, list(self._held))

    def give_up(self) -> None:
        """Forget that a vLLM that has failed holds requests."""
        self._held.clear()

    def abort(self, llm: Any, request_ids: Iterable[int]) -> list[Completion]:
        """Close requests and return, in the order given, what they have so far.

        Raises:
            KeyError: an id is not open; nothing is closed then.
        """
        rows = [self._open.pop(i) for i in ids_to_abort(request_ids, self._open)]
        self._withdraw(llm, [name for name, row in self._held.items() if row.request.request_id not in self._open])
        return [row.completion("aborted") for row in rows]

    def partials(self) -> list[Completion]:
        """What every open request has so far."""
        return [row.completion("aborted") for row in self._open.values()]

    def take(self, llm: Any, outputs: Sequence[Any]) -> list[Completion]:
        """Append what vLLM sampled, and close the requests that have ended.

        Args:
            llm: the engine.
            outputs: what its step gave.

        Returns:
            the completions that ended.

        Raises:
            RuntimeError: vLLM ended a request for a reason of its own.
        """
        completions = []
        ended_here = []  # by a rule that vLLM does not know, such as a stop string
        for output in outputs:
            row = self._held[output.request_id]
            reason = self._extend(row, output.outputs[0])
            if reason is not None:
                completions.append(row.completion(reason))
                del self._open[row.request.request_id]
                ended_here.append(output.request_id)
            elif output.finished:
                raise RuntimeError(
                    f"vLLM ended request {row.request.request_id} ({output.outputs[0].finish_reason}) before its "
                    "completion was over; look at its log, or leave out the engine_args that let it"
                )
        self._withdraw(llm, ended_here)
        return completions

    def _extend(self, row: OpenRequest, sampled: Any) -> FinishReason | None:
        """Append the tokens of one output up to the one that ends the completion."""
        for token, logprob in zip(sampled.token_ids, sampled.logprobs.logprobs, strict=True):
            reason = row.append(token, logprob, self.version)
            if reason is not None:
                return reason
        return None

    def _withdraw(self, llm: Any, names: Sequence[str]) -> None:
        """Take requests out of vLLM, which knows of some already that they have ended."""
        if names:
            llm.abort_request(list(names))
        for name in names:
            del self._held[name]


def check_temperatures(requests: Sequence[RolloutRequest]) -> None:
    """Refuse temperatures that vLLM refuses, above 2, or silently changes: it raises low ones to 0.01.

    Raises:
        ValueError: names the requests.
    """
    lowest, highest = TEMPERATURES
    problems = [
        f"request {request.request_id} has temperature {request.sampling.temperature}"
        for request in requests
        if request.sampling.temperature and not lowest <= request.sampling.temperature <= highest
    ]
    if problems:
        raise ValueError(
            f"requests refused, none was queued: {'; '.join(problems)}; with vLLM it must be 0 (greedy) or from "
            f"{lowest} to {highest}"
        )


def sampling_params(row: OpenRequest) -> Any:
    """The ``vllm.SamplingParams`` of what is left to sample of a request.

    The seed follows from the request's and the number of tokens sampled so far, so that it does not matter why the
    request goes in again.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = row.request.sampling
    return SamplingParams(
        max_tokens=row.room,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=row.part_seed,
        stop_token_ids=sorted(row.eos_token_ids),
        ignore_eos=True,  # the context says which tokens end a completion, not the checkpoint
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
