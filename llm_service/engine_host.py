"""The engine's event loop: front ends' messages in, one message a step and front end out."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import IO

from llm_service.engine import Engine, SequenceProgress, StepResult
from llm_service.frame_socket import FrameSocket, encode_frame
from llm_service.grammar import Grammar
from llm_service.grammar_compiler import GrammarCompiler
from llm_service.messages import (
    AbortChoice,
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    FromEngine,
    RequestAccepted,
    RequestRefused,
    SequenceOutput,
    SlotGrant,
    StepOutput,
    TileStored,
    ToEngine,
)
from llm_service.sequence import QueueRank, SequenceGroup, VisualTile

MAX_FAILED_STEPS = 3  # in a row; then the process gives up and is restarted from outside
POLL_S = 0.5  # how often an idle loop looks for a reason to stop
HEARTBEAT_S = 1.0  # between signs of life, by which front ends tell a hung step
RETRY_SEND_S = 0.001  # while a front end's socket is full
WAIT_S = 20e-6  # between looks at a running step; the kernel adds 50 us

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _FrontEnd:
    socket: FrameSocket
    group_of_request: dict[int, int] = field(default_factory=dict)  # until the front end closes the request
    stats: EngineStats | None = None  # the last it was told


@dataclass(frozen=True)
class _Origin:
    front_end: _FrontEnd
    request_id: int


class EngineHost:
    """Serves one engine to any number of front ends on one thread.

    A front end that disappears takes its requests with it; the others do not notice.
    """

    def __init__(
        self,
        engine: Engine,
        listener: socket.socket,
        ready: EngineReady,
        visual_fd: int,
        max_waiting: int,
        parent: IO[bytes] | None = None,
        max_failed_steps: int = MAX_FAILED_STEPS,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`parent` is a pipe whose end of file means that whoever started the engine is gone.

        Without `grammars`, requests that have one are refused.
        """
        self._engine = engine
        self._listener = listener
        self._ready = ready
        self._visual_fd = visual_fd
        self._max_waiting = max_waiting
        self._origins: dict[int, _Origin] = {}
        self._front_ends: list[_FrontEnd] = []
        self._next_group_id = 0
        self._failed_steps = 0
        self._max_failed_steps = max_failed_steps
        self._stopped = False
        self._last_beat_s = 0.0
        self._grammars = grammars
        self._unbuilt: dict[int, AddRequest] = {}  # by group: those that wait for their grammars
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        if parent is not None:
            self._selector.register(parent, selectors.EVENT_READ, self.stop)
        if grammars is not None:
            self._selector.register(grammars, selectors.EVENT_READ, self._admit_built)

    def stop(self) -> None:
        """Let `run` return after the current step; safe from other threads and signal handlers."""
        self._stopped = True

    def run(self) -> None:
        """Serve until stopped.  Raises what the engine raises when it fails several steps in a row."""
        progressed = False
        try:
            while not self._stopped:
                self._poll(0 if progressed else POLL_S)
                progressed = self._step() if self._engine.has_work else False
                self._send_stats(everyone=not progressed)
        finally:
            for front_end in self._front_ends:
                front_end.socket.close()
            self._selector.close()

    def _poll(self, timeout: float) -> None:
        if any(front_end.socket.has_unsent for front_end in self._front_ends):
            timeout = min(timeout, RETRY_SEND_S)
        for key, _ in self._selector.select(timeout):
            handle: Callable[[], None] = key.data
            handle()
        for front_end in list(self._front_ends):
            self._guard(front_end, front_end.socket.flush)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        front_end = _FrontEnd(FrameSocket(connection, ToEngine))
        self._front_ends.append(front_end)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(front_end))
        greeting, fds = [encode_frame(self._ready)], [self._visual_fd]
        self._guard(front_end, lambda: socket.send_fds(connection, greeting, fds))

    def _read(self, front_end: _FrontEnd) -> None:
        def handle_all() -> None:
            for message in front_end.socket.receive():
                if front_end not in self._front_ends:  # an answer found it gone
                    return
                self._handle(front_end, message)

        self._guard(front_end, handle_all)

    def _guard(self, front_end: _FrontEnd, action: Callable[[], object]) -> None:
        """A broken connection ends its front end, nothing else."""
        try:
            action()
        except OSError as error:
            log.info("front end left: %s", error)
            self._drop(front_end)

    def _drop(self, front_end: _FrontEnd) -> None:
        if front_end not in self._front_ends:
            return
        self._front_ends.remove(front_end)
        self._selector.unregister(front_end.socket)
        front_end.socket.close()
        for request_id in list(front_end.group_of_request):
            self._close(front_end, request_id)

    def _handle(self, front_end: _FrontEnd, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            self._add(front_end, message)
        elif isinstance(message, AbortRequest):
            self._close(front_end, message.request_id)
        elif message.request_id in front_end.group_of_request:
            self._update(front_end, front_end.group_of_request[message.request_id], message)

    def _update(self, front_end: _FrontEnd, group_id: int, message: TileStored | AbortChoice) -> None:
        if isinstance(message, TileStored):
            self._engine.scheduler.tile_stored(group_id, message.tile_index)
        else:
            self._engine.abort_choice(group_id, message.index)
            front_end.stats = None

    def _add(self, front_end: _FrontEnd, message: AddRequest) -> None:
        refusal = self._refusal(message)
        if refusal is not None:
            self._send(front_end, refusal)
            return
        group_id = self._next_group_id
        self._next_group_id += 1
        self._origins[group_id] = _Origin(front_end, message.request_id)
        front_end.group_of_request[message.request_id] = group_id
        if message.grammar:
            assert self._grammars is not None  # else it was refused
            self._unbuilt[group_id] = message
            self._grammars.submit(group_id, message.grammar)
        else:
            self._admit(group_id, message)

    def _admit(self, group_id: int, message: AddRequest, grammar: Grammar | None = None) -> None:
        self._engine.add(_group(group_id, message), grammar)
        self._send(self._origins[group_id].front_end, RequestAccepted(message.request_id))

    def _admit_built(self) -> None:
        """Those whose grammars are ready now, unless they were closed meanwhile."""
        assert self._grammars is not None
        for group_id, grammar in self._grammars.take():
            message = self._unbuilt.pop(group_id, None)
            if message is None:
                continue
            if grammar is None:
                text = "the response format cannot be enforced"
                refusal = RequestRefused(message.request_id, "invalid_request", text)
                self._send(self._origins[group_id].front_end, refusal)
            else:
                self._admit(group_id, message, grammar)

    def _refusal(self, message: AddRequest) -> RequestRefused | None:
        if len(self._engine.scheduler.waiting) + len(self._unbuilt) >= self._max_waiting:
            text = f"{self._max_waiting} sequences are waiting already"
            return RequestRefused(message.request_id, "overloaded", text)
        if message.grammar and self._grammars is None:
            text = "this engine cannot enforce response formats"
            return RequestRefused(message.request_id, "invalid_request", text)
        if not message.prompt_token_ids:
            return RequestRefused(message.request_id, "invalid_request", "the prompt has no tokens")
        longest = len(message.prompt_token_ids) + 1
        if longest > self._ready.max_model_len:
            text = f"prompt of {longest - 1} tokens does not fit into {self._ready.max_model_len}"
            return RequestRefused(message.request_id, "context_length_exceeded", text)
        if any(tile.num_tokens > self._ready.slot_tokens for tile in message.tiles):
            text = f"a tile has more than {self._ready.slot_tokens} visual tokens"
            return RequestRefused(message.request_id, "invalid_request", text)
        return None

    def _close(self, front_end: _FrontEnd, request_id: int) -> None:
        """The front end is done with the request, ended or not; only now are its slots free again."""
        group_id = front_end.group_of_request.pop(request_id, None)
        if group_id is None:
            return
        if group_id in self._engine.scheduler.groups:
            front_end.stats = None
        self._unbuilt.pop(group_id, None)
        self._engine.close(group_id)
        del self._origins[group_id]

    def _step(self) -> bool:
        """False when everything waits for tiles, so that the loop may sleep until one comes."""
        try:
            result = self._engine.launch()
            if not self._engine.is_ready:
                result = self._serve_while_computing(result)
            collected = self._engine.collect()
        except Exception:
            self._fail_all()
            return True
        if collected.has_computed:
            self._failed_steps = 0
        result += collected
        self._publish(result)
        return result.has_computed

    def _serve_while_computing(self, launched: StepResult) -> StepResult:
        """Until the step that is due has ended; returns what is left to publish."""
        self._publish(launched)
        while not self._engine.is_ready:
            self._poll(0)
            time.sleep(WAIT_S)
        return StepResult([], [], launched.has_computed)

    def _fail_all(self) -> None:
        """What a failed forward left in the cache is unknown: nobody in the engine can go on."""
        log.exception("step failed")
        self._failed_steps += 1
        if self._failed_steps >= self._max_failed_steps:
            raise
        self._engine.abandon_steps()
        for group_id in list(self._engine.scheduler.groups):
            origin = self._origins.get(group_id)
            if origin is not None:  # else its front end was found gone meanwhile
                self._engine.abort(group_id)
                refusal = RequestRefused(origin.request_id, "model_error", "the model failed; see the log")
                self._send(origin.front_end, refusal)
        self._engine.scheduler.reset_prefix_cache()

    def _publish(self, result: StepResult) -> None:
        for group_id in result.failed:
            origin = self._origins[group_id]
            text = "the response format takes too much to be enforced"
            self._send(origin.front_end, RequestRefused(origin.request_id, "model_error", text))
        if not (result.progress or result.grants):
            return
        outputs: dict[_FrontEnd, list[SequenceOutput]] = {}
        grants: dict[_FrontEnd, list[SlotGrant]] = {}
        for progress in result.progress:
            origin = self._origins[progress.sequence.group.group_id]
            output = _output(origin.request_id, progress)
            if origin.front_end in outputs:
                outputs[origin.front_end].append(output)
            else:
                outputs[origin.front_end] = [output]
        for grant in result.grants:
            origin = self._origins[grant.group_id]
            slot_grant = SlotGrant(origin.request_id, grant.tile_index, grant.slot)
            grants.setdefault(origin.front_end, []).append(slot_grant)
        stats = self._stats()
        for front_end in outputs.keys() | grants.keys():
            front_end.stats = stats
            message = StepOutput(outputs.get(front_end, []), grants.get(front_end, []), stats)
            self._send(front_end, message)

    def _send_stats(self, everyone: bool) -> None:
        """After aborts, and when the engine comes to rest, nothing else tells that the load has fallen.

        Now and then to all, as a sign of life. Whoever does not read gets none: they would pile up.
        """
        stats, beats = self._stats(), self._is_beat_due()
        for front_end in list(self._front_ends):
            is_news = front_end.stats is None or (everyone and front_end.stats != stats)
            if is_news or (beats and not front_end.socket.has_unsent):
                front_end.stats = stats
                self._send(front_end, StepOutput([], [], stats))

    def _is_beat_due(self) -> bool:
        now_s = time.monotonic()
        is_due = now_s - self._last_beat_s >= HEARTBEAT_S
        if is_due:
            self._last_beat_s = now_s
        return is_due

    def _send(self, front_end: _FrontEnd, message: FromEngine) -> None:
        if front_end in self._front_ends:
            self._guard(front_end, partial(front_end.socket.send, message))

    def _stats(self) -> EngineStats:
        scheduler = self._engine.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=scheduler.num_free_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_store_hits=scheduler.num_store_hits,
            num_store_grants=scheduler.num_store_grants,
            num_store_slots_in_use=scheduler.num_store_slots_in_use,
        )


def _group(group_id: int, message: AddRequest) -> SequenceGroup:
    return SequenceGroup(
        group_id=group_id,
        rank=QueueRank(message.priority, group_id),
        prompt_token_ids=message.prompt_token_ids,
        tiles=tuple(VisualTile(tile.key, tile.offset, tile.num_tokens) for tile in message.tiles),
        params=message.params,
        stop_token_ids=frozenset(message.stop_token_ids),
        max_tokens=message.max_tokens,
        cache_salt=message.cache_salt,
        takes_turns=message.takes_turns,
        arrival_tokens=message.arrival_tokens,
    )


def _output(request_id: int, progress: SequenceProgress) -> SequenceOutput:
    sequence, tokens, clock = progress
    reason = sequence.finish_reason
    return SequenceOutput(
        request_id,
        sequence.index,
        tokens,
        reason and reason.value,
        sequence.num_cached_tokens,
        clock.scheduled_ns,
        clock.overlap_ns,
    )
