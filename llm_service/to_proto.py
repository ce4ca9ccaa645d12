"""Events of a generation to responses of the contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_service.answer_parser import CallStart
from llm_service.choice import ChoiceDelta, ChoiceFinished, Logprob, TokenLogprobs
from llm_service.generation import GenerationEvent, GenerationStarted, GenerationUsage
from llm_service.picture import PartGrid
from protos import encoder_pb2, language_model_pb2

_FINISH_REASONS = {
    "stop": language_model_pb2.FINISH_REASON_STOP,
    "length": language_model_pb2.FINISH_REASON_LENGTH,
    "tool_calls": language_model_pb2.FINISH_REASON_TOOL_CALLS,
}


def event_to_proto(event: GenerationEvent, request_id: str) -> language_model_pb2.GenerateResponse:
    response = language_model_pb2.GenerateResponse()
    set_event(response, event, request_id)
    return response


def set_event(
    target: language_model_pb2.GenerateResponse | language_model_pb2.SessionEvent,
    event: GenerationEvent,
    request_id: str,
) -> None:
    """Both messages have the same events.  Filled in place: a copy per token would cost as much again."""
    if isinstance(event, ChoiceDelta):
        _set_delta(target.delta, event)
    elif isinstance(event, ChoiceFinished):
        target.finished.CopyFrom(_finished(event))
    elif isinstance(event, GenerationStarted):
        target.started.request_id = request_id
        target.started.prompt_tokens = event.prompt_tokens
        target.started.media.extend(map(_medium_parts, event.media))
    else:
        target.usage.CopyFrom(_usage(event))


def _medium_parts(grids: Sequence[PartGrid]) -> language_model_pb2.MediumParts:
    return language_model_pb2.MediumParts(
        parts=[encoder_pb2.PartLayout(**dataclasses.asdict(grid)) for grid in grids]
    )


def _set_delta(target: language_model_pb2.Delta, delta: ChoiceDelta) -> None:
    target.text = delta.text
    target.token_ids.extend(delta.token_ids)
    if delta.index:
        target.index = delta.index
    if delta.reasoning:
        target.reasoning = delta.reasoning
    for piece in delta.tool_calls:
        if isinstance(piece, CallStart):
            target.tool_calls.add(index=piece.index, name=piece.name)
        else:
            target.tool_calls.add(index=piece.index, arguments=piece.text)
    if delta.logprobs:
        target.logprobs.extend(_token_logprobs(logprobs) for logprobs in delta.logprobs)


def _token_logprobs(logprobs: TokenLogprobs) -> language_model_pb2.TokenLogprobs:
    return language_model_pb2.TokenLogprobs(
        token=_logprob(logprobs.token), top=[_logprob(logprob) for logprob in logprobs.top]
    )


def _logprob(logprob: Logprob) -> language_model_pb2.Logprob:
    return language_model_pb2.Logprob(
        token_id=logprob.token_id, logprob=logprob.logprob, text=logprob.text, raw=logprob.raw
    )


def _finished(finished: ChoiceFinished) -> language_model_pb2.Finished:
    return language_model_pb2.Finished(
        index=finished.index,
        reason=_FINISH_REASONS[finished.reason],
        stop_string=finished.stop_string or "",
        stop_token_id=finished.stop_token_id,
    )


def _usage(usage: GenerationUsage) -> language_model_pb2.Usage:
    timings = usage.timings
    return language_model_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        visual_tokens=usage.visual_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        timings=language_model_pb2.GenerateTimings(
            layout_ns=timings.layout_ns,
            encode_ns=timings.encode_ns,
            queue_ns=timings.queue_ns,
            prefill_ns=timings.prefill_ns,
            overlap_ns=timings.overlap_ns,
            decode_ns=timings.decode_ns,
            total_ns=timings.total_ns,
        ),
    )
