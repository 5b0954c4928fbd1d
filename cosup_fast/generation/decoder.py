"""Continuous batching: many requests, each at its own stage, in one forward a step.

1. Waiting requests take the slots that are free.
2. One forward reads the next tokens of all: one of each request that decodes, a chunk of each that reads its prompt
   or a passage. Keys and values are kept, so no token is read twice (but for `ctx_truncate`).
3. Where a request has read [NSP], its hidden state is a query: those of the step are searched together, and the
   passages are read in the next step. Everywhere else a token is chosen.

A request's tokens depend on its neighbours by no more than the rounding of a product of other height.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from cosup_fast.config.generation import GenerationConfig
from cosup_fast.errors import CosupError
from cosup_fast.generation.answer import Answer, StopReason
from cosup_fast.generation.cache import Chunk
from cosup_fast.generation.grammar import Grammar, State, choose
from cosup_fast.generation.listener import Listener, Phase
from cosup_fast.generation.request import Asked, Found, Index, Request, Searcher
from cosup_fast.generation.runner import Runner, check_cache
from cosup_fast.generation.task import Task
from cosup_fast.index import NonparametricIndex

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

_checked: WeakSet[torch.nn.Module] = WeakSet()


class Ticket:
    """A request that was submitted: its answer as soon as there is one."""

    def __init__(self, request: Request, listener: Listener):
        self.request = request
        self.answer: Answer | None = None
        self.exception: Exception | None = None  # the cause of `answer.error`
        self.timeline: list[tuple[Phase, float]] = []  # phases and when they began, by `time.perf_counter`
        self._listener = listener
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the request before the next step, from any thread; what it has written is its answer."""
        self._cancelled = True

    def result(self) -> Answer:
        """The answer.

        Raises:
            Exception: the one that ended the request.
        """
        if self.exception is not None:
            raise self.exception
        assert self.answer is not None, "the request has not ended yet"
        return self.answer


class BrokenDecoderError(CosupError, RuntimeError):
    """The memory of the cache cannot be written any more, as after some errors of a GPU: the decoder cannot go on."""


class Decoder:
    """Answers requests together. `step` is one forward; requests may be submitted and cancelled between steps.

    Args:
        model: Gen and Embseq.
        index: the index that this model built, any `retrieve(query, k)`, or a `Searcher`.
        config: how to write, where a request does not say otherwise.
        max_batch: requests at once; the others wait.
        step_tokens: most tokens of prompts and passages that one step reads, which bounds how long requests that
            decode wait for those that read.
        grammar: what may follow what.

    Raises:
        ValueError: `max_batch` or `step_tokens` below 1, or a Gen whose keys and values cannot be cached.
    """

    def __init__(
        self,
        model: CoSupervisionModel,
        index: Index,
        config: GenerationConfig | None = None,
        *,
        max_batch: int = 16,
        step_tokens: int = 512,
        grammar: Grammar | None = None,
    ):
        for name, value in (("max_batch", max_batch), ("step_tokens", step_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if model.gen not in _checked:
            check_cache(model)
            _checked.add(model.gen)
        self.model = model
        self.config = config or GenerationConfig()
        self.runner = Runner(model, max_batch)
        self._index = index
        self._step_tokens = step_tokens
        self._grammar = grammar or Grammar(model.template, model.vocabulary, model.device)
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, tuple[Ticket, Task]] = {}  # by slot, in the order of admission
        self._free = list(range(max_batch))
        self._ended: list[Ticket] = []

    def submit(
        self,
        request: Request,
        on_text: Callable[[str], None] | None = None,
        *,
        listener: Listener | None = None,
    ) -> Ticket:
        """Adds a request; it is answered by the steps that follow.

        Args:
            request: the question.
            on_text: called with each new piece of the answer's text; the pieces together are `Answer.text`. What it
                raises ends this request.
            listener: called with text, passages and grounded segments, in place of `on_text`.

        Raises:
            ValueError: both `on_text` and `listener`.
        """
        if listener is None:
            listener = Listener() if on_text is None else _TextListener(on_text)
        elif on_text is not None:
            raise ValueError(f"on_text={on_text!r} and listener={listener!r} both hear the text: give one of them")
        ticket = Ticket(request, listener)
        self._waiting.append(ticket)
        return ticket

    @property
    def idle(self) -> bool:
        """Whether every request has ended."""
        return not (self._waiting or self._running)

    @property
    def free(self) -> int:
        """How many more requests could run at once."""
        return max(0, len(self._free) - len(self._waiting))

    def step(self) -> list[Ticket]:
        """One forward for all requests; returns those that ended."""
        self._drop_cancelled()
        self._admit()
        if self._running:
            ready = self._read()
            asking = [slot for slot, _ in ready if self._running[slot][1].state is State.PASSAGE]
            self._choose([(slot, hidden) for slot, hidden in ready if slot not in asking])
            self._retrieve([(slot, hidden) for slot, hidden in ready if slot in asking])
            for slot, (_, task) in list(self._running.items()):
                if task.stop_reason is not None:
                    self._end(slot)
        ended, self._ended = self._ended, []
        return ended

    def run(self) -> Iterator[Ticket]:
        """Steps until every request has ended; yields each as it ends."""
        while not self.idle:
            yield from self.step()

    def abort(self, error: Exception) -> list[Ticket]:
        """Ends every running request with an error that a step raised; returns their tickets. Others still wait."""
        for slot in list(self._running):
            self._fail(slot, error)
        ended, self._ended = self._ended, []
        return ended

    def abandon(self, error: Exception) -> list[Ticket]:
        """Ends every request, also those that wait, without a touch of the model or its cache, which may be broken:
        nothing may be submitted any more. Returns the tickets of all that have not been returned yet."""
        for ticket, task in self._running.values():
            ticket.exception = error
            try:
                ticket.answer = task.fail(error)
            except Exception:  # of a listener
                ticket.answer = _unwritten("error", str(error))
        for ticket in self._waiting:
            ticket.exception, ticket.answer = error, _unwritten("error", str(error))
        ended = [*self._ended, *(ticket for ticket, _ in self._running.values()), *self._waiting]
        self._running, self._ended = {}, []
        self._waiting.clear()
        return ended

    def _drop_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._waiting if ticket._cancelled]:
            self._waiting.remove(ticket)
            ticket.answer = _unwritten("cancelled")
            self._ended.append(ticket)
        for slot, (ticket, task) in list(self._running.items()):
            if ticket._cancelled:
                task.stop_reason = "cancelled"
                self._end(slot)

    def _admit(self) -> None:
        while self._waiting and self._free:
            ticket = self._waiting.popleft()
            try:
                config = ticket.request.config or self.config
                task = Task(ticket.request, config, self._grammar, ticket._listener, ticket.timeline)
            except Exception as error:
                ticket.exception = error
                ticket.answer = _unwritten("error", str(error))
                self._ended.append(ticket)
            else:
                # The lowest slot: neighbouring slots attend together.
                self._running[heapq.heappop(self._free)] = ticket, task

    def _read(self) -> list[tuple[int, Tensor]]:
        """Reads what is pending; the slots where nothing is pending any more, with their last hidden states (D,)."""
        room = self._step_tokens
        chunks: list[Chunk] = []
        for slot, (_, task) in self._running.items():
            count = len(task.pending)
            if count > 1:
                count = min(count, room)
                room -= count
            if count:
                chunks.append(Chunk(slot, task.length, task.pending[:count]))
        try:
            hidden = self.runner.read(chunks)
        except Exception as error:
            if not out_of_memory(error):
                raise
            # The cache is as wide as its longest request: without that one the others have room.
            self._fail(max(chunks, key=lambda chunk: chunk.end).slot, error)
            return []
        ready = []
        for chunk, state in zip(chunks, hidden, strict=True):
            task = self._running[chunk.slot][1]
            task.read(len(chunk.tokens))
            if not task.pending:
                ready.append((chunk.slot, state))
        return ready

    def _choose(self, ready: Sequence[tuple[int, Tensor]]) -> None:
        if not ready:
            return
        tasks = [self._running[slot][1] for slot, _ in ready]
        with torch.inference_mode():
            logits = self.runner.logits(torch.stack([hidden for _, hidden in ready]))
            broken = logits.isnan().any(dim=-1).tolist()
            self._grammar.restrict(logits, [task.state for task in tasks], [task.may_retrieve for task in tasks])
            best = logits.argmax(dim=-1).tolist()
        for row, ((slot, _), task) in enumerate(zip(ready, tasks, strict=True)):
            try:
                if broken[row]:
                    raise ValueError("Gen's logits are not numbers: the weights are damaged, or training diverged")
                token = task.forced
                if token is None:
                    greedy = task.config.temperature == 0
                    token = best[row] if greedy else choose(logits[row], task.config, task.random)
                task.take(token)
            except Exception as error:
                self._fail(slot, error)

    def _retrieve(self, ready: Sequence[tuple[int, Tensor]]) -> None:
        """Searches the queries of the step, those of one index in one call."""
        if not ready:
            return
        hidden = torch.stack([state for _, state in ready])
        with torch.inference_mode():
            queries = self.model.queries(hidden, torch.arange(len(ready), device=hidden.device))
        by_index: dict[int, list[int]] = {}
        own = [self._running[slot][0].request.index for slot, _ in ready]
        indexes = [self._index if index is None else index for index in own]
        for row, index in enumerate(indexes):
            by_index.setdefault(id(index), []).append(row)
        for rows in by_index.values():
            tasks = [self._running[ready[row][0]][1] for row in rows]
            wanted = max(task.config.candidates for task in tasks)
            asked = [task.asked(queries[row]) for row, task in zip(rows, tasks, strict=True)]
            index = indexes[rows[0]]
            found: Sequence[Found | Exception]
            try:
                found = _search(index, asked, wanted)
            except Exception:  # of one query perhaps: the others are to have their passages
                found = [_search_one(index, one, wanted) for one in asked]
            for row, task, passages in zip(rows, tasks, found, strict=True):
                try:
                    if isinstance(passages, Exception):
                        raise passages
                    task.insert(passages[: task.config.candidates])
                except Exception as error:
                    self._fail(ready[row][0], error)

    def _fail(self, slot: int, error: Exception) -> None:
        ticket, task = self._running.pop(slot)
        ticket.exception = error
        ticket.answer = task.fail(error)
        self._ended.append(ticket)
        try:
            self.runner.cache.clear(slot)
        except Exception as broken:
            raise BrokenDecoderError(f"the place of a failed request cannot be cleared: {broken}") from broken
        heapq.heappush(self._free, slot)

    def _end(self, slot: int) -> None:
        ticket, task = self._running[slot]
        try:
            ticket.answer = task.answer()
        except Exception as error:
            self._fail(slot, error)
        else:
            del self._running[slot]
            self._ended.append(ticket)
            heapq.heappush(self._free, slot)


class _TextListener(Listener):
    """Passes text on to a function."""

    def __init__(self, on_text: Callable[[str], None]):
        self.on_text = on_text  # type: ignore[method-assign]


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a CPU or on a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _unwritten(reason: StopReason, error: str | None = None) -> Answer:
    """The answer of a request that never ran."""
    return Answer(
        text="",
        segments=(),
        retrievals=(),
        stop_reason=reason,
        prompt_tokens=0,
        generated_tokens=0,
        inserted_tokens=0,
        error=error,
    )


def _search(index: Index, asked: Sequence[Asked], k: int) -> Sequence[Found]:
    if isinstance(index, NonparametricIndex):
        return index.retrieve_all(torch.stack([one.query for one in asked]), k)
    if isinstance(index, Searcher):
        found = index.search_all(asked, k)
        if len(found) != len(asked):
            raise ValueError(f"search_all was asked {len(asked)} times and gave {len(found)} answers")
        return found
    return [index(one.query, k) for one in asked]


def _search_one(index: Index, asked: Asked, k: int) -> Found | Exception:
    try:
        return _search(index, [asked], k)[0]
    except Exception as error:
        return error
