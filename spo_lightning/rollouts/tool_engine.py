"""An engine whose completions may call tools: the loop around another engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor

from spo_lightning.errors import ConfigError
from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts.request_checks import ids_to_abort
from spo_lightning.rollouts.tool_results import encode_results, extended, last_turn, num_results, unfinished
from spo_lightning.tools.call_pool import CallPool, Turn
from spo_lightning.tools.protocol import BadCall, ToolCall
from spo_lightning.tools.settings import ToolUse
from spo_lightning.tools.statistics import ToolStatistics
from spo_lightning.types import Completion, FinishReason, RolloutRequest

WAIT_SECONDS = 0.5  # of one step in which nothing but calls is under way
PAUSE_SECONDS = 0.05  # between two looks at an engine that runs in the background
Limit = Literal["turns", "tokens", "time"]


@dataclass(eq=False)
class _Conversation:
    """One open request: in the inner engine, or waiting for the results of a turn's calls.

    Attributes:
        request: as submitted.
        calling: the completion up to the calls that are under way; ``None`` while the model writes.
        seconds: wall time of the calls before.
    """

    request: RolloutRequest
    calling: Completion | None = None
    seconds: float = 0.0


class ToolEngine(RolloutEngine):
    """Lets another engine's completions call tools, and keeps the contract of an engine itself.

    A request whose turn ends with a call leaves the inner engine, so it holds nobody up; when its tool has answered it
    goes back with the result as tokens that the policy did not sample (``completion_mask`` False, log-probability 0).
    All that is known of a request is in its tokens: a partial completion that ends with a call has that call made
    (again) when it is submitted.

    A limit of ``ToolUse`` ends a completion like ``max_tokens`` does, with ``finish_reason`` "length", behind the call
    that it did not allow.

    Around an engine that runs in the background, completions go through their turns while nobody calls ``step``.

    Args:
        engine: generates; not started.
        use: tools, format and limits.
    """

    def __init__(self, engine: RolloutEngine, use: ToolUse) -> None:
        self.engine = engine
        self.use = use
        self.runs_in_background = engine.runs_in_background
        self.ranks_per_engine = engine.ranks_per_engine
        self._statistics = ToolStatistics()
        self._open: dict[int, _Conversation] = {}
        self._ready: list[Completion] = []
        self._calls: CallPool
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._failure: Exception | None = None

    def start(self, context: EngineContext) -> None:
        """Start tools and inner engine.

        Raises:
            ConfigError: a tool cannot work, or format, tokenizer and limits do not fit together.
        """
        self._tokenizer: Any = context.tokenizer
        self._eos = frozenset(context.eos_token_ids)
        self.use.format.check(context.tokenizer, self.use.tools)
        room = min(self.use.max_result_tokens, self.use.max_tool_tokens)
        if self._encoded([""], ended=False, room=room - 1) is None:
            raise ConfigError(
                f"model.tool_use allows a result {room} tokens, and the format alone takes as many; raise "
                "max_result_tokens and max_tool_tokens"
            )
        self._calls = CallPool(self.use.tools, self.use.max_concurrent_calls, self.use.call_timeout_s)
        with ExitStack() as undo:
            undo.callback(self.use.close)
            self.use.start()
            self.engine.start(context)
            undo.pop_all()
        if self.runs_in_background:
            self._closed.clear()
            self._thread = threading.Thread(target=self._run_in_background, name="tool loop", daemon=True)
            self._thread.start()

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests; a partial completion that ends with a call begins with making it."""
        ids = [request.request_id for request in requests]
        with self._lock:
            repeated = [i for i in ids if i in self._open or ids.count(i) > 1]
            if repeated:
                raise ValueError(f"requests {repeated} are open already or come twice; give each an id of its own")
            conversations = [_Conversation(request) for request in requests]
            calling = [c for c in conversations if self._ends_turn(c.request)]
            self._generate([c for c in conversations if c not in calling])
            self._open |= {c.request.request_id: c for c in conversations}
            for conversation in calling:
                partial = conversation.request.partial
                assert partial is not None
                ended = replace(partial, request_id=conversation.request.request_id, finish_reason="stop")
                self._turn_ended(conversation, ended)

    def step(self) -> list[Completion]:
        """Advance the inner engine; with calls alone under way, wait for one, at most half a second."""
        with self._lock:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if not self._ready:
                self._advance(WAIT_SECONDS)
            finished, self._ready = self._ready, []
            for completion in finished:
                del self._open[completion.request_id]
            return finished

    def abort(self, request_ids: Iterable[int]) -> list[Completion]:
        """Stop open requests; calls under way are given up, and made again when the completion goes on."""
        with self._lock:
            ids = ids_to_abort(request_ids, self._open)
            have = self._outside_engine()
            have |= {c.request_id: self._seen_from_outside(c) for c in self.engine.abort(set(ids) - have.keys())}
            for i in ids:
                self._calls.cancel(i)
                del self._open[i]
            self._ready = [completion for completion in self._ready if completion.request_id not in ids]
            return [have[i] for i in ids]

    def partials(self) -> list[Completion]:
        """What every open request has so far, in the order they were submitted."""
        with self._lock:
            have = {c.request_id: self._seen_from_outside(c) for c in self.engine.partials()} | self._outside_engine()
            return [have[i] for i in self._open]

    def take_statistics(self) -> ToolStatistics:
        """What became of calls since the last time."""
        with self._lock:
            taken, self._statistics = self._statistics, ToolStatistics()
            return ToolStatistics.merged([taken, self._calls.take_statistics()])

    @contextmanager
    def counting_nothing(self) -> Iterator[None]:
        """Leave calls that end within out of the statistics."""
        kept = self.take_statistics()
        try:
            yield
        finally:
            with self._lock:
                self.take_statistics()
                self._statistics = kept

    @property
    def max_model_len(self) -> int:
        """Of the inner engine."""
        return self.engine.max_model_len

    @property
    def num_open(self) -> int:
        """Requests submitted and neither returned nor aborted."""
        return len(self._open)

    def take_idle_seconds(self) -> dict[str, float]:
        """Of the inner engine, which has nothing to do while all completions wait for tools."""
        return self.engine.take_idle_seconds()

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Of the inner engine."""
        with self._lock:
            self.engine.update_weights(named_parameters, version)
            self._failure = None  # what it was, the engine is well again

    def sleep(self) -> None:
        """Let the inner engine sleep."""
        self.engine.sleep()

    def wake_up(self) -> None:
        """Wake the inner engine."""
        self.engine.wake_up()

    def close(self) -> None:
        """Close inner engine and tools, and give up all calls."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for i in self._open:
            self._calls.cancel(i)
        self._open.clear()
        self._ready.clear()
        self._thread = self._failure = None
        try:
            self.engine.close()
        finally:
            self.use.close()

    def _run_in_background(self) -> None:
        """Take calls from the inner engine, and results to it, while nobody steps; in a thread of its own."""
        while not self._closed.wait(PAUSE_SECONDS):
            with self._lock:
                if self._open and self._failure is None:
                    try:
                        self._advance(0.0)
                    except Exception as error:  # whatever it is, it is for the one who steps
                        self._failure = error

    def _advance(self, wait_s: float) -> None:
        """Step the inner engine and begin calls, and take results to it; wait for those if it has nothing to do."""
        if self.engine.num_open:
            for completion in self.engine.step():
                self._turn_ended(self._open[completion.request_id], completion)
            self._answer(self._calls.take())
        elif self._open:
            began = time.perf_counter()
            results = self._calls.take(0.0 if self._ready else wait_s)
            self._statistics.wait_s += time.perf_counter() - began
            self._answer(results)

    def _outside_engine(self) -> dict[int, Completion]:
        """Completions that have ended, or wait for results, by request."""
        calling = {i: c.calling for i, c in self._open.items() if c.calling is not None}
        return calling | {completion.request_id: completion for completion in self._ready}

    def _seen_from_outside(self, completion: Completion) -> Completion:
        """What the inner engine has of a request; that a turn has ended does not end the completion."""
        conversation = self._open[completion.request_id]
        calls = self._calls_of(conversation, completion)
        if calls:
            return (
                self._final(completion, "length") if self._limit(conversation, completion) else unfinished(completion)
            )
        return completion if completion.finish_reason == "aborted" else self._final(completion)

    def _generate(self, conversations: Sequence[_Conversation]) -> None:
        """Let the model write on."""
        requests = [conversation.request for conversation in conversations]
        self.engine.submit([self._stopping_at_calls(request) for request in requests])

    def _stopping_at_calls(self, request: RolloutRequest) -> RolloutRequest:
        if not request.use_tools:
            return request
        stop = (*request.sampling.stop, *self.use.format.stop)
        return replace(request, sampling=replace(request.sampling, stop=stop))

    def _turn_ended(self, conversation: _Conversation, completion: Completion) -> None:
        """Make the calls of a turn, or take the completion as it is."""
        calls = self._calls_of(conversation, completion)
        if not calls:
            self._ready.append(self._final(completion))
            return
        limit = self._limit(conversation, completion)
        if limit is None and len(calls) > 1 and self._encoded([""] * len(calls), False, self._room(completion)) is None:
            limit = "tokens"
        if limit is not None:
            self._statistics.limits[limit] += 1
            self._ready.append(self._final(completion, "length"))
            return
        conversation.calling = unfinished(completion)
        self._calls.begin(completion.request_id, calls, self.use.max_seconds - conversation.seconds)

    def _limit(self, conversation: _Conversation, completion: Completion) -> Limit | None:
        """What forbids another call."""
        if num_results(completion.completion_mask) >= self.use.max_turns:
            return "turns"
        if completion.num_sampled >= conversation.request.sampling.max_tokens or self._room(completion) < 1:
            return "tokens"
        return "time" if conversation.seconds >= self.use.max_seconds else None

    def _room(self, completion: Completion) -> int:
        """Most tokens of the next result, so that the model can still write one behind it."""
        used = int((~completion.completion_mask).sum())
        context = self.max_model_len - len(completion.prompt_token_ids) - len(completion.token_ids) - 1
        return min(self.use.max_result_tokens, self.use.max_tool_tokens - used, context)

    def _answer(self, turns: Iterable[Turn]) -> None:
        """Put results behind their calls, and let the model write on, before requests that have not begun."""
        answered = []
        for turn in turns:
            conversation = self._open[cast(int, turn.key)]
            completion = conversation.calling
            assert completion is not None
            conversation.seconds += turn.seconds
            ended = int(completion.token_ids[-1]) == self._tokenizer.eos_token_id
            token_ids = self._encoded([result.text for result in turn.results], ended, self._room(completion))
            conversation.calling = None
            if token_ids is None:
                self._statistics.limits["tokens"] += 1
                self._ready.append(self._final(completion, "length"))
                continue
            partial = extended(completion, token_ids)
            conversation.request = replace(conversation.request, partial=partial, urgent=True)
            answered.append(conversation)
        if answered:
            self._generate(answered)

    def _encoded(self, results: Sequence[str], ended: bool, room: int) -> list[int] | None:
        return encode_results(self.use.format.answer(results, self._tokenizer, ended), self._tokenizer, room)

    def _final(self, completion: Completion, reason: FinishReason | None = None) -> Completion:
        tokens, mask = completion.token_ids, completion.completion_mask
        return replace(
            completion,
            text=self._decode(tokens),
            sampled_text=None if mask.all() else self._decode(tokens[mask]),
            finish_reason=reason or completion.finish_reason,
        )

    def _calls_of(self, conversation: _Conversation, completion: Completion) -> list[ToolCall | BadCall]:
        """The calls of the last turn; none when the model has not ended it."""
        if completion.finish_reason != "stop" or not conversation.request.use_tools:
            return []
        return self.use.format.calls(self._decode(last_turn(completion)), self.use.tools)

    def _ends_turn(self, request: RolloutRequest) -> bool:
        """Whether a request's partial completion ends with calls that have no result."""
        partial = request.partial
        if partial is None or not len(partial.token_ids) or not partial.completion_mask[-1]:
            return False
        turn = self._decode(last_turn(partial))
        stopped = any(string in turn for string in (*request.sampling.stop, *self.use.format.stop))
        if not stopped and int(partial.token_ids[-1]) not in self._eos:
            return False
        return bool(self._calls_of(_Conversation(request), replace(partial, finish_reason="stop")))

    def _decode(self, token_ids: Tensor) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
