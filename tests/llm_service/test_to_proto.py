"""Every field of every event arrives in the contract's message."""

from __future__ import annotations

from llm_service.choice import ChoiceDelta, ChoiceFinished, Logprob, TokenLogprobs
from llm_service.generation import GenerationStarted, GenerationUsage
from llm_service.generation_clock import GenerationTimings
from llm_service.picture import PartGrid
from llm_service.to_proto import event_to_proto
from protos import encoder_pb2
from protos import language_model_pb2 as pb


def test_started() -> None:
    response = event_to_proto(GenerationStarted(prompt_tokens=12), "r-7")
    assert response == pb.GenerateResponse(started=pb.Started(request_id="r-7", prompt_tokens=12))


def test_started_tells_what_was_cut_of_each_medium() -> None:
    picture = (PartGrid(640, 480, 4, 3, True, 13),)
    clip = (PartGrid(64, 48, 1, 1, False, 1, 0.5), PartGrid(64, 48, 1, 1, False, 1, 1.5))
    message = event_to_proto(GenerationStarted(12, (picture, clip)), "r").started
    assert message.media[0].parts[0] == encoder_pb2.PartLayout(
        width=640, height=480, columns=4, rows=3, has_thumbnail=True, num_tiles=13
    )
    assert [part.timestamp_s for part in message.media[1].parts] == [0.5, 1.5]


def test_delta_with_logprobs() -> None:
    token = TokenLogprobs(Logprob(5, -0.25, "\ufffd", b"\xc3"), [Logprob(6, -0.5, "a", b"a")])
    response = event_to_proto(ChoiceDelta(2, "text", [5, 6], [token]), "r")
    assert response == pb.GenerateResponse(
        delta=pb.Delta(
            index=2,
            text="text",
            token_ids=[5, 6],
            logprobs=[
                pb.TokenLogprobs(
                    token=pb.Logprob(token_id=5, logprob=-0.25, text="\ufffd", raw=b"\xc3"),
                    top=[pb.Logprob(token_id=6, logprob=-0.5, text="a", raw=b"a")],
                )
            ],
        )
    )


def test_finished_for_each_reason() -> None:
    by_string = event_to_proto(ChoiceFinished(1, "stop", "###", None), "r").finished
    assert by_string == pb.Finished(index=1, reason=pb.FINISH_REASON_STOP, stop_string="###")
    assert not by_string.HasField("stop_token_id")
    by_token = event_to_proto(ChoiceFinished(0, "stop", None, 0), "r").finished
    assert by_token.HasField("stop_token_id") and by_token.stop_token_id == 0
    by_length = event_to_proto(ChoiceFinished(0, "length", None, None), "r").finished
    assert by_length == pb.Finished(reason=pb.FINISH_REASON_LENGTH)


def test_usage_with_timings() -> None:
    timings = GenerationTimings(1, 2, 3, 4, 5, 6, 7)
    usage = GenerationUsage(
        prompt_tokens=10, visual_tokens=8, cached_tokens=4, completion_tokens=3, timings=timings
    )
    assert event_to_proto(usage, "r") == pb.GenerateResponse(
        usage=pb.Usage(
            prompt_tokens=10,
            visual_tokens=8,
            cached_tokens=4,
            completion_tokens=3,
            timings=pb.GenerateTimings(
                layout_ns=1, encode_ns=2, queue_ns=3, prefill_ns=4, overlap_ns=5, decode_ns=6, total_ns=7
            ),
        )
    )
