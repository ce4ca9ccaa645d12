"""LanguageModel over real gRPC, before a real engine and a scripted encoder.

`serving` asserts after every test that no block, slot, stream or call is left.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from llm_service.config import LLMConfig
from llm_service.sampling_params import SamplingParams
from llm_service.servicer import LanguageModelServicer
from protos import encoder_pb2, language_model_pb2_grpc
from protos import language_model_pb2 as pb
from protos.channel import open_channel
from protos.errors import (
    ContextLengthExceeded,
    FingerprintMismatch,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServingError,
    Unavailable,
)
from protos.frames import EncodeEvent
from protos.options import MAX_CHUNK_BYTES, SHARED_OPTIONS
from protos.statuses import error_from_rpc
from tests.checkpoints import make_checkpoint
from tests.llm_service.fakes import num_granted
from tests.llm_service.front_end import EOS_ID, SPECIAL, FrontEnd, front_end
from tests.llm_service.scripted_encoder import (
    EncoderSide,
    ScriptedEncoder,
    bad_medium,
    beating,
    hang,
    heartbeat,
    refuses,
)
from tests.llm_service.test_from_proto import image, preprocessing, text, user
from tests.processes import ServiceProcess

CONTEXT_ID = SPECIAL.index("<IMG_CONTEXT>")


@dataclass
class Service:
    stub: language_model_pb2_grpc.LanguageModelStub
    front: FrontEnd
    servicer: LanguageModelServicer

    async def generate(self, *parts: pb.Part, **fields: Any) -> list[pb.GenerateResponse]:
        return [event async for event in self.stub.Generate(ask(*parts, **fields))]

    async def refusal(self, awaitable: Any) -> ServingError:
        """The error of a call, as any client of ours reads it."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await awaitable
        return error_from_rpc(raised.value)


@asynccontextmanager
async def serving(
    encoder: ScriptedEncoder | None = None, sampling: SamplingParams | None = None, **options: Any
) -> AsyncIterator[Service]:
    config = LLMConfig(model="org/tiny", max_images=3, max_image_tiles=20, max_request_bytes=4096)
    async with front_end(encoder, **options) as front:
        server = grpc.aio.server(options=SHARED_OPTIONS)
        servicer = LanguageModelServicer(
            config, preprocessing(), sampling or SamplingParams(), front.backends
        )
        language_model_pb2_grpc.add_LanguageModelServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = open_channel(f"127.0.0.1:{port}")
        try:
            yield Service(language_model_pb2_grpc.LanguageModelStub(channel), front, servicer)
            await front.nothing_is_left()
        finally:
            await channel.close()
            await server.stop(None)


def ask(*parts: pb.Part, request_id: str = "", **sampling: Any) -> pb.GenerateRequest:
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": 8, **sampling}
    return pb.GenerateRequest(
        request_id=request_id,
        messages=[user(*(parts or (text("what"),)))],
        sampling=pb.SamplingParams(**sampling),
    )


class TestGenerate:
    async def test_the_order_of_events(self) -> None:
        async with serving() as it:
            events = await it.generate(image(b"cat"), text("what"), n=2)
            kinds = [event.WhichOneof("event") for event in events]
            assert kinds[0] == "started" and kinds[-1] == "usage"
            assert set(kinds[1:-1]) == {"delta", "finished"} and kinds.count("finished") == 2
            assert {event.finished.index for event in events if event.HasField("finished")} == {0, 1}
            usage = events[-1].usage
            assert usage.completion_tokens == 16 and usage.visual_tokens == 12
            assert usage.prompt_tokens == events[0].started.prompt_tokens
            assert usage.timings.total_ns > usage.timings.decode_ns > 0

    async def test_the_request_id_is_the_callers_and_goes_on_to_the_encoder(self) -> None:
        async with serving() as it:
            [started, *_] = await it.generate(image(b"cat"), request_id="mine")
            assert started.started.request_id == "mine"
            metadata = (("x-request-id", "from-metadata"), ("traceparent", "00-a-b-01"))
            call = it.stub.Generate(ask(image(b"dog")), metadata=metadata)
            events = [event async for event in call]
            assert events[0].started.request_id == "from-metadata"
            first, second = it.front.encoder.sides
            assert first.opening.request_id == first.metadata["x-request-id"] == "mine"
            assert second.metadata["traceparent"] == "00-a-b-01"
            assert second.opening.request_id == "from-metadata"

    async def test_the_resolved_tiling_reaches_the_encoder(self) -> None:
        async with serving() as it:
            await it.generate(image(b"a", max_tiles=2, use_thumbnail=False), image(b"b"))
            tilings = [medium.tiling for medium in it.front.encoder.sides[0].opening.media]
            assert [(t.min_tiles, t.max_tiles, t.use_thumbnail) for t in tilings] == [
                (1, 2, False),
                (1, 12, True),
            ]

    async def test_what_a_request_leaves_out_takes_the_checkpoints_defaults(self) -> None:
        async with serving(sampling=SamplingParams(max_tokens=5)) as it:
            request = ask()
            request.sampling.ClearField("max_tokens")
            assert (await collect(it.stub.Generate(request)))[-1].usage.completion_tokens == 5
            assert (await it.generate(max_tokens=7))[-1].usage.completion_tokens == 7

    async def test_the_checkpoints_max_tokens_end_with_the_context(self) -> None:
        async with serving(sampling=SamplingParams(max_tokens=100_000)) as it:
            request = pb.GenerateRequest(prompt_token_ids=[7] * 250)
            request.sampling.ignore_eos = True
            events = await collect(it.stub.Generate(request))
            assert events[-1].usage.completion_tokens == 6

    async def test_cache_salts_share_nothing(self) -> None:
        async with serving() as it:
            cached = []
            for salt in (b"", b"", b"tenant", b"tenant"):
                request = ask(image(b"cat"), text("what is this"))
                request.cache_salt = salt
                events = [event async for event in it.stub.Generate(request)]
                cached.append(events[-1].usage.cached_tokens)
            assert cached[0] == cached[2] == 0 and cached[1] == cached[3] > 12


def pieces(*data: bytes, cache_salt: bytes = b"") -> list[pb.UploadMediaRequest]:
    first = pb.UploadMediaRequest(num_bytes=sum(map(len, data)), cache_salt=cache_salt)
    return [first, *(pb.UploadMediaRequest(data=piece) for piece in data)]


class TestVideosAndUploads:
    async def test_each_frame_is_a_picture_of_the_prompt(self) -> None:
        video = pb.Part(video=pb.Video(data=b"clip", sampling=encoder_pb2.FrameSampling(num_frames=3)))
        async with serving() as it:
            events = await it.generate(video, text("what"))
            [medium] = it.front.encoder.sides[0].opening.media
            assert medium.kind == encoder_pb2.MEDIA_KIND_VIDEO and medium.sampling.num_frames == 3
            assert (medium.tiling.min_tiles, medium.tiling.max_tiles) == (1, 1)
            usage = events[-1].usage
            frames = sum(len(f"Frame{number}: ") + len("\n") + 2 for number in (1, 2, 3))
            picture = (await it.generate(image(b"cat"), text("what")))[-1].usage
            assert usage.visual_tokens == picture.visual_tokens == 12
            # A letter is a token, two where the vocabulary has them together.
            assert picture.prompt_tokens < usage.prompt_tokens < picture.prompt_tokens + frames
            again = (await it.generate(video, text("what")))[-1].usage
            assert again.cached_tokens > 12

    async def test_an_upload_in_pieces_is_what_its_request_names(self) -> None:
        async with serving() as it:
            answer = await it.stub.UploadMedia(iter(pieces(b"clip", b"", b"s", cache_salt=b"tenant")))
            assert answer.num_bytes == 5 and answer.ttl_s > 0
            request = ask(pb.Part(document=pb.Document(upload=answer.upload)), text("what"))
            request.cache_salt = b"tenant"
            events = [event async for event in it.stub.Generate(request)]
            assert events[-1].usage.visual_tokens == 12
            assert it.front.encoder.sides[0].media == [b"clips"]
            request.cache_salt = b""
            refused = await it.refusal(collect(it.stub.Generate(request)))
            assert isinstance(refused, NotFound) and refused.field == "messages[0].parts[0].document.upload"

    @pytest.mark.parametrize(
        ("messages", "field"),
        [
            ([], "num_bytes"),
            (pieces(b""), "num_bytes"),
            ([pb.UploadMediaRequest(num_bytes=2**63)], "num_bytes"),
            (pieces(b"x", b"y")[:2], "data"),
            ([*pieces(b"x"), pb.UploadMediaRequest(data=b"y")], "data"),
            (pieces(bytes(MAX_CHUNK_BYTES + 1)), "data"),
            (pieces(b"x", cache_salt=bytes(1025)), "cache_salt"),
        ],
    )
    async def test_bad_uploads_are_named(self, messages: list[pb.UploadMediaRequest], field: str) -> None:
        async with serving() as it:
            refused = await it.refusal(it.stub.UploadMedia(iter(messages)))
            assert isinstance(refused, InvalidRequest) and refused.field == field

    async def test_a_caller_that_leaves_takes_its_bytes_along(self) -> None:
        async def stalls() -> AsyncIterator[pb.UploadMediaRequest]:
            yield pb.UploadMediaRequest(data=bytes(1000), num_bytes=1001)
            await hang()

        async with serving() as it:
            uploads = it.servicer._uploads
            call = it.stub.UploadMedia(stalls())
            async with asyncio.timeout(10):
                while not uploads.num_bytes:
                    await asyncio.sleep(0.005)
                call.cancel()
                while uploads.num_bytes:
                    await asyncio.sleep(0.005)

    async def test_a_layout_that_contradicts_itself_is_the_encoders_fault(self) -> None:
        async def odd(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            layout = side.layout()
            layout.layout.media[0].parts.add(num_tiles=1)
            yield layout
            await hang()

        async with serving(ScriptedEncoder(beating(odd))) as it:
            refused = await it.refusal(it.generate(pb.Part(video=pb.Video(data=b"clip"))))
            assert isinstance(refused, Unavailable)


class TestErrors:
    @pytest.mark.parametrize("medium", [0, 1, 2])
    @pytest.mark.parametrize("when", ["headers", "pixels"])
    async def test_a_bad_picture_is_named_as_the_caller_knows_it(self, medium: int, when: str) -> None:
        async def late(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            raise bad_medium(medium)

        script = late if when == "pixels" else refuses(bad_medium(medium))
        request = pb.GenerateRequest(
            messages=[
                user(text("a"), image(b"1")),
                pb.Message(role="assistant", parts=[text("b")]),
                user(image(b"2"), text("c"), image(b"3")),
            ]
        )
        fields = ["messages[0].parts[1]", "messages[2].parts[0]", "messages[2].parts[2]"]
        async with serving(ScriptedEncoder(beating(script))) as it:
            error = await it.refusal(collect(it.stub.Generate(request)))
            assert type(error) is InvalidRequest and error.message == "not an image"
            assert error.field == f"{fields[medium]}.image.data"

    async def test_a_tiling_that_the_encoder_refuses(self) -> None:
        error = InvalidRequest("max_tiles is 20, must be in [1, 12]", field="media[0].tiling.max_tiles")
        async with serving(ScriptedEncoder(refuses(error))) as it:
            got = await it.refusal(it.generate(text("a"), image(b"1", max_tiles=20)))
            assert got.field == "messages[0].parts[1].image.tiling.max_tiles"

    @pytest.mark.parametrize(
        ("parts", "sampling", "kind", "field"),
        [
            ([text("a")], {"temperature": 3}, InvalidRequest, "sampling.temperature"),
            ([text("a"), pb.Part()], {}, InvalidRequest, "messages[0].parts[1]"),
            ([image(b"1")] * 4, {}, InvalidRequest, "messages[0].parts[3].image"),
            ([image(b"1" * 5000)], {}, InvalidRequest, "messages[0].parts[0].image.data"),
            ([text("x" * 300)], {}, ContextLengthExceeded, "messages"),
        ],
    )
    async def test_carry_the_field(
        self, parts: list[pb.Part], sampling: dict[str, Any], kind: type[ServingError], field: str
    ) -> None:
        async with serving() as it:
            error = await it.refusal(it.generate(*parts, **sampling))
            assert type(error) is kind and error.field == field
            assert it.front.encoder.sides == []

    async def test_an_image_outside_a_user_message(self) -> None:
        async with serving() as it:
            request = pb.GenerateRequest(messages=[pb.Message(role="assistant", parts=[image(b"1")])])
            error = await it.refusal(collect(it.stub.Generate(request)))
            assert error.field == "messages[0].parts[0]"

    async def test_a_placeholder_among_token_ids(self) -> None:
        async with serving() as it:
            request = pb.GenerateRequest(prompt_token_ids=[7, 8, CONTEXT_ID])
            error = await it.refusal(collect(it.stub.Generate(request)))
            assert type(error) is InvalidRequest and error.field == "prompt_token_ids[2]"

    async def test_a_placeholder_spelled_in_text_is_text(self) -> None:
        async with serving() as it:
            events = await it.generate(text("<IMG_CONTEXT><image>"), image(b"1"))
            assert events[-1].usage.visual_tokens == 12

    async def test_no_encoder(self) -> None:
        async with serving() as it:
            await it.front.encoder.stop()
            error = await it.refusal(it.generate(image(b"1")))
            assert type(error) is Unavailable and error.retry_after_s
            assert (await it.generate(text("still there")))[-1].usage.completion_tokens == 8

    async def test_an_encoder_with_another_checkpoint(self) -> None:
        encoder = ScriptedEncoder()
        encoder.fingerprint = b"o" * 32
        async with serving(encoder) as it:
            error = await it.refusal(it.generate(image(b"1")))
            assert type(error) is FingerprintMismatch and error.field is None

    async def test_an_overloaded_encoder(self) -> None:
        encoder = ScriptedEncoder(refuses(Overloaded("too many streams", retry_after_s=3.0)))
        async with serving(encoder) as it:
            error = await it.refusal(it.generate(image(b"1")))
            assert type(error) is Overloaded and error.retry_after_s == 3.0


async def collect(call: Any) -> list[pb.GenerateResponse]:
    return [event async for event in call]


class TestCancel:
    """Everything is free again within one step, asserted by `serving` too."""

    async def test_while_the_encoder_reads_the_headers(self) -> None:
        async def stuck(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await hang()
            yield heartbeat()

        async with serving(ScriptedEncoder(stuck)) as it:
            call = it.stub.Generate(ask(image(b"1")))
            reading = asyncio.create_task(call.read())
            await wait_for(lambda: len(it.front.encoder.sides) == 1)
            call.cancel()
            await asyncio.wait([reading])
            await it.front.nothing_is_left()

    async def test_while_a_tile_is_awaited(self) -> None:
        async def stuck(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            await hang()

        async with serving(ScriptedEncoder(beating(stuck))) as it:
            call = it.stub.Generate(ask(image(b"1")))
            assert (await call.read()).HasField("started")
            await wait_for(lambda: num_granted(it.front.engine.store) > 0)
            call.cancel()
            await it.front.nothing_is_left()

    async def test_between_tokens(self) -> None:
        async with serving() as it:
            it.front.engine.runner.pace()
            it.front.engine.runner.allow(4)
            call = it.stub.Generate(ask(image(b"1"), max_tokens=100, n=2))
            while not (await call.read()).HasField("delta"):
                pass
            call.cancel()
            await asyncio.sleep(0.1)  # the engine learns of it while its step runs
            it.front.engine.runner.allow(1)
            await it.front.nothing_is_left()

    async def test_by_a_client_that_never_reads(self) -> None:
        async with serving() as it:
            call = it.stub.Generate(ask(max_tokens=200, n=4, logprobs=20))
            await wait_for(lambda: len(it.front.engine.runner.steps) > 5)
            call.cancel()
            await it.front.nothing_is_left()

    async def test_by_the_callers_deadline(self) -> None:
        async with serving() as it:
            it.front.engine.runner.pace()
            call = it.stub.Generate(ask(image(b"1")), timeout=0.3)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await collect(call)
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            it.front.engine.runner.unpace()
            await it.front.nothing_is_left()


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


class TestTokens:
    async def test_tokenize_text_takes_special_tokens_for_text(self) -> None:
        async with serving() as it:
            got = await it.stub.Tokenize(pb.TokenizeRequest(text="a<|im_end|>"))
            assert EOS_ID not in got.token_ids and len(got.token_ids) == 11
            assert (await it.stub.Tokenize(pb.TokenizeRequest())).token_ids == []

    async def test_tokenize_a_conversation_as_generate_does(self) -> None:
        async with serving() as it:
            conversation = pb.Conversation(messages=[user(text("hi"), text(" there"))])
            got = await it.stub.Tokenize(pb.TokenizeRequest(messages=conversation))
            await it.generate(text("hi there"))
            assert list(got.token_ids) == it.front.engine.runner.steps[0].token_ids

    @pytest.mark.parametrize(
        ("messages", "field"),
        [
            ([], "messages.messages"),
            ([user(text("a")), user(text("b"), image(b"1"))], "messages.messages[1].parts[1]"),
            ([user(pb.Part())], "messages.messages[0].parts[0]"),
            ([pb.Message(role="judge")], "messages.messages[0].role"),
        ],
        ids=["empty", "picture", "empty part", "role"],
    )
    async def test_a_conversation_that_cannot_be_tokenized(
        self, messages: list[pb.Message], field: str
    ) -> None:
        async with serving() as it:
            request = pb.TokenizeRequest(messages=pb.Conversation(messages=messages))
            error = await it.refusal(it.stub.Tokenize(request))
            assert type(error) is InvalidRequest and error.field == field

    async def test_detokenize(self) -> None:
        async with serving() as it:
            token_ids = [*it.front.backends.tokenizer.encode_plain("caf\u00e9"), EOS_ID]
            request = pb.DetokenizeRequest(token_ids=token_ids)
            assert (await it.stub.Detokenize(request)).text == "caf\u00e9<|im_end|>"
            request.skip_special_tokens = True
            assert (await it.stub.Detokenize(request)).text == "caf\u00e9"
            error = await it.refusal(it.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 64])))
            assert error.field == "token_ids[1]"

    async def test_more_token_ids_than_a_context_holds(self) -> None:
        async with serving() as it:
            error = await it.refusal(it.stub.Detokenize(pb.DetokenizeRequest(token_ids=[7] * 257)))
            assert type(error) is InvalidRequest and error.field == "token_ids"
            request = pb.GenerateRequest(prompt_token_ids=[7] * 256)
            error = await it.refusal(collect(it.stub.Generate(request)))
            assert type(error) is ContextLengthExceeded and error.field == "prompt_token_ids"


class TestModel:
    async def test_says_what_is_loaded_and_its_limits(self) -> None:
        async with serving() as it:
            await it.front.backends.encoders.fingerprint()
            model = await it.stub.GetModel(pb.GetLanguageModelRequest())
            assert (model.model, model.max_model_len, model.tokens_per_tile) == ("org/tiny", 256, 256)
            assert (model.max_images, model.max_tiles, model.max_request_bytes) == (3, 20, 4096)
            assert model.tiling == encoder_pb2.TilingOptions(min_tiles=1, max_tiles=12, use_thumbnail=True)
            assert model.encoders_ready == 1

    async def test_says_how_busy_it_is(self) -> None:
        async with serving() as it:
            it.front.engine.runner.pace()
            it.front.engine.runner.allow(4)
            call = it.stub.Generate(ask(max_tokens=150))
            while not (await call.read()).HasField("delta"):
                pass
            busy = await it.stub.GetModel(pb.GetLanguageModelRequest())
            assert busy.sequences_running == 1 and 0 < busy.kv_cache_usage < 1
            call.cancel()
            it.front.engine.runner.unpace()
            await it.front.nothing_is_left()
            async with asyncio.timeout(20):
                while (await it.stub.GetModel(pb.GetLanguageModelRequest())).kv_cache_usage > 0:
                    await asyncio.sleep(0.01)


@pytest.mark.slow
class TestJoin:
    """`tessera llm` as a process, with an engine that others share."""

    def test_another_models_engine_is_refused_and_its_own_is_joined(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "a", "qwen3", "chat")
        other = make_checkpoint(tmp_path / "b", "qwen2", "chat")
        flags = ("--port", "0", "--engine-socket", str(tmp_path / "engine.sock"), "--kv-cache-gib", "0.02")
        owner = ServiceProcess("llm", str(checkpoint), *flags)
        try:
            refused = subprocess.run(
                [sys.executable, "-m", "deploy", "llm", str(other), *flags],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert refused.returncode == 1 and "Traceback" not in refused.stderr
            assert "its engine serves another model" in refused.stderr.splitlines()[-1]
            joined = ServiceProcess("llm", str(checkpoint), *flags)
            assert sum("joined the engine" in line for line in joined.log) == 1
            assert joined.stop() == 0 and owner.process.poll() is None
        finally:
            owner.stop()

    def test_a_killed_engines_socket_is_replaced(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path, "qwen3", "chat")
        path = tmp_path / "engine.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
            stale.bind(str(path))
        flags = ("--port", "0", "--engine-socket", str(path), "--kv-cache-gib", "0.02")
        service = ServiceProcess("llm", str(checkpoint), *flags)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
        assert service.stop() == 0


GREEDY = "sampling defaults of the checkpoint: SamplingParams(temperature=0.0)"


@pytest.mark.slow
class TestGenerationConfig:
    """`tessera llm` as a process, before a checkpoint whose generation_config.json says something."""

    @pytest.mark.parametrize(("setting", "is_greedy"), [("auto", True), ("none", False)])
    def test_its_defaults_hold_unless_told_otherwise(
        self, tmp_path: Path, setting: str, is_greedy: bool
    ) -> None:
        checkpoint = make_checkpoint(tmp_path, "qwen3", "chat")
        (checkpoint / "generation_config.json").write_text('{"do_sample": false}')
        flags = ("--port", "0", "--kv-cache-gib", "0.02", "--generation-config", setting)
        service = ServiceProcess("llm", str(checkpoint), *flags)
        try:
            with grpc.insecure_channel(service.address) as channel:
                stub = language_model_pb2_grpc.LanguageModelStub(channel)
                answers = {answer_of(stub) for _ in range(4)}
            assert (len(answers) == 1) == is_greedy
            assert any(GREEDY in line for line in service.log) == is_greedy
        finally:
            assert service.stop() == 0

    def test_a_value_out_of_range_ends_the_start_before_an_engine_runs(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path, "qwen3", "chat")
        (checkpoint / "generation_config.json").write_text('{"temperature": 2.5}')
        command = [sys.executable, "-m", "deploy", "llm", str(checkpoint), "--port", "0"]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        [line] = refused.stderr.splitlines()
        assert line.endswith("generation_config.json: temperature: must be in [0, 2], got 2.5")


def answer_of(stub: Any) -> tuple[int, ...]:
    sampling = pb.SamplingParams(max_tokens=16, ignore_eos=True)
    request = pb.GenerateRequest(prompt_token_ids=[5, 6, 7], sampling=sampling)
    return tuple(token for event in stub.Generate(request) for token in event.delta.token_ids)
