"""Events of a generation to responses of the contract."""

from __future__ import annotations

from llm_service.choice import ChoiceDelta, ChoiceFinished, Logprob, TokenLogprobs
from llm_service.generation import GenerationEvent, GenerationStarted, GenerationUsage
from protos import language_model_pb2

_FINISH_REASONS = {
    "stop": language_model_pb2.FINISH_REASON_STOP,
    "length": language_model_pb2.FINISH_REASON_LENGTH,
}


def event_to_proto(event: GenerationEvent, request_id: str) -> language_model_pb2.GenerateResponse:
    if isinstance(event, ChoiceDelta):
        return language_model_pb2.GenerateResponse(delta=_delta(event))
    if isinstance(event, ChoiceFinished):
        return language_model_pb2.GenerateResponse(finished=_finished(event))
    if isinstance(event, GenerationStarted):
        started = language_model_pb2.Started(request_id=request_id, prompt_tokens=event.prompt_tokens)
        return language_model_pb2.GenerateResponse(started=started)
    return language_model_pb2.GenerateResponse(usage=_usage(event))


def _delta(delta: ChoiceDelta) -> language_model_pb2.Delta:
    return language_model_pb2.Delta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_token_logprobs(logprobs) for logprobs in delta.logprobs],
    )


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
            decode_ns=timings.decode_ns,
            total_ns=timings.total_ns,
        ),
    )
