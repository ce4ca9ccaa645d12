"""Every field of a request, its default, its limit and the path that an error names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from llm_service.from_proto import (
    MAX_CACHE_SALT_BYTES,
    RequestLimits,
    detokenize_from_proto,
    generation_from_proto,
    messages_from_proto,
    response_format_from_proto,
    sampling_params_from_proto,
    tool_use_from_proto,
)
from llm_service.generation_input import GenerationInput, MediumInput
from llm_service.prompt import DocumentPart, ImagePart, Message, TextPart, VideoPart
from llm_service.response_format import FormatKind, ResponseFormat
from llm_service.sampling_params import SamplingParams
from llm_service.templates import Call
from llm_service.tools import Tool, ToolChoice, ToolUse
from protos import encoder_pb2
from protos import language_model_pb2 as pb
from protos.errors import ContextLengthExceeded, InvalidRequest, NotFound
from protos.media import DEFAULT_NUM_FRAMES, FrameSampling, MediaKind
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

LIMITS = RequestLimits(
    vocab_size=100,
    max_model_len=1000,
    max_images=3,
    max_image_tiles=40,
    max_request_bytes=64,
    max_video_frames=50,
)
METADATA = (("x-request-id", "r"),)


def preprocessing(min_tiles: int = 1, max_tiles: int = 12, use_thumbnail: bool = True) -> Preprocessing:
    return Preprocessing(
        image_size=448,
        patch_size=14,
        downsample_ratio=0.5,
        ps_version="v2",
        min_tiles=min_tiles,
        max_tiles=max_tiles,
        use_thumbnail=use_thumbnail,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def text(string: str) -> pb.Part:
    return pb.Part(text=string)


def image(data: bytes = b"png", **tiling: Any) -> pb.Part:
    return pb.Part(image=pb.Image(data=data, tiling=encoder_pb2.TilingOptions(**tiling)))


def user(*parts: pb.Part) -> pb.Message:
    return pb.Message(role="user", parts=parts)


def find_upload(cache_salt: bytes, digest: bytes) -> bytes | None:
    return b"uploaded" if (cache_salt, digest) == (b"salt", b"digest") else None


def read(
    request: pb.GenerateRequest,
    defaults: Preprocessing | None = None,
    limits: RequestLimits = LIMITS,
    sampling: SamplingParams | None = None,
) -> GenerationInput:
    return generation_from_proto(
        request, defaults or preprocessing(), limits, sampling or SamplingParams(), METADATA, find_upload
    )


def field_of_refusal(request: pb.GenerateRequest, **options: Any) -> str | None:
    with pytest.raises(InvalidRequest) as raised:
        read(request, **options)
    return raised.value.field


class TestRequest:
    def test_everything_arrives(self) -> None:
        request = pb.GenerateRequest(
            messages=[
                pb.Message(role="system", parts=[text("be brief")]),
                user(text("a"), image(b"1"), text("b"), image(b"2")),
                pb.Message(role="assistant", parts=[text("c")]),
                user(image(b"3")),
            ],
            sampling=pb.SamplingParams(temperature=0),
            priority=-4,
            cache_salt=b"tenant",
        )
        got = read(request)
        assert got.messages == [
            Message("system", (TextPart("be brief"),)),
            Message("user", (TextPart("a"), ImagePart(0), TextPart("b"), ImagePart(1))),
            Message("assistant", (TextPart("c"),)),
            Message("user", (ImagePart(2),)),
        ]
        assert [(i.data, i.field) for i in got.media] == [
            (b"1", "messages[1].parts[1].image"),
            (b"2", "messages[1].parts[3].image"),
            (b"3", "messages[3].parts[0].image"),
        ]
        assert (got.priority, got.cache_salt, got.metadata) == (-4, b"tenant", METADATA)
        assert got.prompt_token_ids == [] and got.params == SamplingParams(temperature=0.0)

    def test_token_ids_instead_of_messages(self) -> None:
        got = read(pb.GenerateRequest(prompt_token_ids=[0, 99]))
        assert got.prompt_token_ids == [0, 99] and got.messages == [] and got.media == []

    def test_exactly_one_of_them(self) -> None:
        assert field_of_refusal(pb.GenerateRequest()) == "messages"
        both = pb.GenerateRequest(messages=[user(text("a"))], prompt_token_ids=[1])
        assert field_of_refusal(both) == "messages"

    def test_a_token_id_outside_the_vocabulary(self) -> None:
        request = pb.GenerateRequest(prompt_token_ids=[1, 99, 100])
        assert field_of_refusal(request) == "prompt_token_ids[2]"

    def test_a_cache_salt_that_is_too_long(self) -> None:
        fits = pb.GenerateRequest(prompt_token_ids=[1], cache_salt=b"x" * MAX_CACHE_SALT_BYTES)
        assert len(read(fits).cache_salt) == MAX_CACHE_SALT_BYTES
        fits.cache_salt += b"x"
        assert field_of_refusal(fits) == "cache_salt"

    def test_an_empty_part(self) -> None:
        request = pb.GenerateRequest(messages=[user(text("a")), user(text("b"), pb.Part())])
        assert field_of_refusal(request) == "messages[1].parts[1]"

    def test_an_empty_text_is_a_text(self) -> None:
        assert messages_from_proto([user(text(""))]) == [Message("user", (TextPart(""),))]


class TestImages:
    def test_an_empty_picture(self) -> None:
        request = pb.GenerateRequest(messages=[user(text("a"), image(b""))])
        assert field_of_refusal(request) == "messages[0].parts[1].image.data"
        unset = pb.GenerateRequest(messages=[user(pb.Part(image=pb.Image()))])
        assert field_of_refusal(unset) == "messages[0].parts[0].image.data"

    def test_too_many_pictures_name_the_first_that_is_one_too_many(self) -> None:
        fits = [user(image(), image()), user(image())]
        assert len(read(pb.GenerateRequest(messages=fits)).media) == 3
        request = pb.GenerateRequest(messages=[*fits, user(text("a"), image())])
        assert field_of_refusal(request) == "messages[2].parts[1].image"

    def test_too_many_bytes_name_the_first_that_does_not_fit(self) -> None:
        fits = pb.GenerateRequest(messages=[user(image(b"x" * 32), image(b"x" * 32))])
        assert len(read(fits).media) == 2
        request = pb.GenerateRequest(messages=[user(image(b"x" * 32), image(b"x" * 33), image(b"x"))])
        assert field_of_refusal(request) == "messages[0].parts[1].image.data"

    @pytest.mark.parametrize(
        ("defaults", "tiling", "expected"),
        [
            (preprocessing(), {}, (1, 12, True)),
            (preprocessing(2, 6, False), {}, (2, 6, False)),
            (preprocessing(2, 6, False), {"use_thumbnail": True}, (2, 6, True)),
            (preprocessing(2, 6), {"use_thumbnail": False}, (2, 6, False)),
            (preprocessing(4, 6), {"max_tiles": 2}, (2, 2, True)),  # the default minimum gives way
            (preprocessing(1, 6), {"min_tiles": 9}, (9, 9, True)),  # the default maximum gives way
            (preprocessing(1, 6), {"min_tiles": 3, "max_tiles": 40}, (3, 40, True)),
            (preprocessing(1, 48), {}, (1, 48, True)),  # the checkpoint's own default is always allowed
            (preprocessing(1, 48), {"max_tiles": 48}, (1, 48, True)),
            (preprocessing(1, 1, False), {}, (1, 1, False)),
        ],
    )
    def test_tiling_with_the_checkpoints_defaults(
        self, defaults: Preprocessing, tiling: dict[str, Any], expected: tuple[int, int, bool]
    ) -> None:
        request = pb.GenerateRequest(messages=[user(image(b"png", **tiling))])
        [got] = read(request, defaults).media
        assert got == MediumInput(b"png", *expected, field="messages[0].parts[0].image")

    @pytest.mark.parametrize(
        ("tiling", "name"),
        [
            ({"max_tiles": 0}, "max_tiles"),
            ({"max_tiles": 41}, "max_tiles"),
            ({"min_tiles": 0}, "min_tiles"),
            ({"min_tiles": 41}, "min_tiles"),
            ({"min_tiles": 5, "max_tiles": 4}, "min_tiles"),
            ({"max_tiles": 2**32 - 1}, "max_tiles"),
        ],
    )
    def test_tiling_out_of_range(self, tiling: dict[str, Any], name: str) -> None:
        request = pb.GenerateRequest(messages=[user(text("a")), user(image(b"png", **tiling))])
        assert field_of_refusal(request) == f"messages[1].parts[0].image.tiling.{name}"


def video(data: bytes = b"mp4", **fields: Any) -> pb.Part:
    return pb.Part(video=pb.Video(data=data, **fields))


def sampling(**fields: Any) -> encoder_pb2.FrameSampling:
    return encoder_pb2.FrameSampling(**fields)


class TestVideosAndDocuments:
    def test_they_are_numbered_among_the_pictures(self) -> None:
        document = pb.Part(document=pb.Document(data=b"pdf"))
        got = read(pb.GenerateRequest(messages=[user(image(), video()), user(document, text("a"))]))
        assert [message.parts for message in got.messages] == [
            (ImagePart(0), VideoPart(1)),
            (DocumentPart(2), TextPart("a")),
        ]
        kinds = [MediaKind.IMAGE, MediaKind.VIDEO, MediaKind.DOCUMENT]
        assert [(medium.kind, medium.data) for medium in got.media] == list(
            zip(kinds, (b"png", b"mp4", b"pdf"), strict=True)
        )
        assert got.media[2].field == "messages[1].parts[0].document"

    @pytest.mark.parametrize(
        ("wire", "expected"),
        [
            ({}, FrameSampling(DEFAULT_NUM_FRAMES)),
            ({"num_frames": 50}, FrameSampling(50)),
            ({"fps": 0.5}, FrameSampling(50, fps=0.5)),  # as many as are allowed
            ({"fps": 2, "num_frames": 4}, FrameSampling(4, fps=2)),
            ({"start_s": 1, "end_s": 3}, FrameSampling(DEFAULT_NUM_FRAMES, start_s=1, end_s=3)),
        ],
    )
    def test_sampling_is_resolved(self, wire: dict[str, Any], expected: FrameSampling) -> None:
        [got] = read(pb.GenerateRequest(messages=[user(video(sampling=sampling(**wire)))])).media
        assert got.sampling == expected

    def test_frames_take_one_tile_and_pages_the_checkpoints(self) -> None:
        document = pb.Part(document=pb.Document(data=b"pdf"))
        media = read(pb.GenerateRequest(messages=[user(video(), document)]), preprocessing(2, 6)).media
        assert [(medium.min_tiles, medium.max_tiles) for medium in media] == [(1, 1), (2, 6)]
        four = video(tiling=encoder_pb2.TilingOptions(max_tiles=4))
        [medium] = read(pb.GenerateRequest(messages=[user(four)])).media
        assert (medium.min_tiles, medium.max_tiles) == (1, 4)

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({"num_frames": 0}, "num_frames"),
            ({"num_frames": 51}, "num_frames"),
            ({"fps": 0}, "fps"),
            ({"fps": float("nan")}, "fps"),
            ({"start_s": -1}, "start_s"),
            ({"start_s": 2, "end_s": 1}, "end_s"),
        ],
    )
    def test_impossible_samplings_are_named(self, fields: dict[str, Any], name: str) -> None:
        request = pb.GenerateRequest(messages=[user(text("a"), video(sampling=sampling(**fields)))])
        assert field_of_refusal(request) == f"messages[0].parts[1].video.sampling.{name}"

    def test_all_media_count_together(self) -> None:
        request = pb.GenerateRequest(messages=[user(*[video()] * 3, image())])
        assert field_of_refusal(request) == "messages[0].parts[3].image"
        large = pb.GenerateRequest(messages=[user(image(b"x" * 40), video(b"x" * 25))])
        assert field_of_refusal(large) == "messages[0].parts[1].video.data"
        empty = pb.GenerateRequest(messages=[user(video(b""))])
        assert field_of_refusal(empty) == "messages[0].parts[0].video.data"


class TestUploads:
    @pytest.mark.parametrize("name", ["image", "video", "document"])
    def test_an_upload_stands_for_its_data(self, name: str) -> None:
        kind = {"image": pb.Image, "video": pb.Video, "document": pb.Document}[name]
        part = pb.Part(**{name: kind(upload=b"digest")})
        [medium] = read(pb.GenerateRequest(messages=[user(part)], cache_salt=b"salt")).media
        assert medium.data == b"uploaded"

    @pytest.mark.parametrize(("salt", "digest"), [(b"", b"digest"), (b"salt", b"other"), (b"salt", b"")])
    def test_an_unknown_one_is_not_found(self, salt: bytes, digest: bytes) -> None:
        part = pb.Part(video=pb.Video(upload=digest))
        with pytest.raises(NotFound) as caught:
            read(pb.GenerateRequest(messages=[user(part)], cache_salt=salt))
        assert caught.value.field == "messages[0].parts[0].video.upload"

    def test_its_bytes_are_not_the_requests(self) -> None:
        parts = [pb.Part(video=pb.Video(upload=b"digest")), image(b"x" * 60)]
        request = pb.GenerateRequest(messages=[user(*parts)], cache_salt=b"salt")
        assert len(read(request).media) == 2


class TestUrls:
    @pytest.mark.parametrize("name", ["image", "video", "document"])
    def test_a_url_stands_for_its_data(self, name: str) -> None:
        kind = {"image": pb.Image, "video": pb.Video, "document": pb.Document}[name]
        part = pb.Part(**{name: kind(url="https://example.org/a")})
        [medium] = read(pb.GenerateRequest(messages=[user(part)])).media
        assert (medium.url, medium.data) == ("https://example.org/a", b"")

    @pytest.mark.parametrize("url", ["", "https://example.org/" + "a" * 2048, "https://ex\u00e4mple.org/"])
    def test_one_that_no_encoder_takes_is_refused(self, url: str) -> None:
        part = pb.Part(image=pb.Image(url=url))
        field = field_of_refusal(pb.GenerateRequest(messages=[user(part)]))
        assert field == "messages[0].parts[0].image.url"


OF_THE_CHECKPOINT = SamplingParams(
    max_tokens=5, temperature=0.5, top_p=0.75, top_k=20, min_p=0.125, repetition_penalty=1.25
)


class TestSampling:
    @pytest.mark.parametrize("defaults", [SamplingParams(), OF_THE_CHECKPOINT])
    def test_unset_fields_take_the_defaults(self, defaults: SamplingParams) -> None:
        assert sampling_params_from_proto(pb.SamplingParams(), defaults) == defaults
        got = read(pb.GenerateRequest(prompt_token_ids=[1]), sampling=defaults)
        assert got.params == defaults

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_tokens", 7),
            ("temperature", 0.0),
            ("temperature", 1.0),
            ("top_p", 1.0),
            ("top_k", 0),
            ("top_k", -1),
            ("min_p", 0.0),
            ("repetition_penalty", 1.0),
        ],
    )
    def test_a_value_that_was_set_wins_even_where_it_is_the_contracts_default(
        self, name: str, value: Any
    ) -> None:
        got = sampling_params_from_proto(pb.SamplingParams(**{name: value}), OF_THE_CHECKPOINT)
        assert got == msgspec.structs.replace(OF_THE_CHECKPOINT, **{name: value})

    def test_a_default_of_max_tokens_gives_way_to_min_tokens(self) -> None:
        request = pb.GenerateRequest(prompt_token_ids=[1], sampling=pb.SamplingParams(min_tokens=6))
        assert read(request, sampling=OF_THE_CHECKPOINT).params.max_tokens == 6
        request.sampling.min_tokens = 4
        assert read(request, sampling=OF_THE_CHECKPOINT).params.max_tokens == 5

    def test_every_field_arrives(self) -> None:
        values: dict[str, Any] = {
            "max_tokens": 7,
            "min_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 5,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.75,
            "logit_bias": {3: -100.0, 4: 50.0},
            "seed": -(2**63),
            "n": 4,
            "stop": ("a", "b"),
            "stop_token_ids": (8, 9),
            "ignore_eos": True,
            "logprobs": 0,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
        }
        assert set(values) == set(SamplingParams.__struct_fields__)
        assert set(values) == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
        expected = SamplingParams(**values)
        assert sampling_params_from_proto(pb.SamplingParams(**values), SamplingParams()) == expected
        assert sampling_params_from_proto(pb.SamplingParams(**values), OF_THE_CHECKPOINT) == expected

    @pytest.mark.parametrize("name", ["temperature", "seed", "logprobs"])
    def test_a_zero_that_was_set_is_a_zero(self, name: str) -> None:
        got = sampling_params_from_proto(pb.SamplingParams(**{name: 0}), SamplingParams())
        assert getattr(got, name) == 0

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_tokens", 0),
            ("temperature", 2.1),
            ("temperature", float("nan")),
            ("top_p", 0.0),
            ("top_k", -2),
            ("min_p", 1.5),
            ("repetition_penalty", 0.0),
            ("presence_penalty", 2.5),
            ("frequency_penalty", -2.5),
            ("logit_bias", {100: 1.0}),
            ("logit_bias", {1: 101.0}),
            ("n", 0),
            ("n", 129),
            ("stop", [""]),
            ("stop", ["x"] * 17),
            ("stop_token_ids", [100]),
            ("logprobs", 21),
        ],
    )
    def test_a_value_out_of_range_is_refused_by_name(self, name: str, value: Any) -> None:
        request = pb.GenerateRequest(prompt_token_ids=[1], sampling=pb.SamplingParams(**{name: value}))
        assert field_of_refusal(request) == f"sampling.{name}"

    def test_min_tokens_above_max_tokens(self) -> None:
        sampling = pb.SamplingParams(min_tokens=3, max_tokens=2)
        request = pb.GenerateRequest(prompt_token_ids=[1], sampling=sampling)
        assert field_of_refusal(request) == "sampling.min_tokens"


def test_limits_come_from_the_service() -> None:
    request = pb.GenerateRequest(messages=[user(image(b"x" * 9))])
    tight = replace(LIMITS, max_request_bytes=8)
    assert field_of_refusal(request, limits=tight) == "messages[0].parts[0].image.data"


class TestLengths:
    """Millions of ids are refused by their number, before anything walks over them."""

    def test_a_prompt_leaves_room_for_a_token(self) -> None:
        assert len(read(pb.GenerateRequest(prompt_token_ids=[1] * 999)).prompt_token_ids) == 999
        with pytest.raises(ContextLengthExceeded, match="1000 tokens") as raised:
            read(pb.GenerateRequest(prompt_token_ids=[500] * 1000))
        assert raised.value.field == "prompt_token_ids"

    def test_what_is_detokenized_is_at_most_a_context(self) -> None:
        fits = pb.DetokenizeRequest(token_ids=[1] * 1000)
        assert detokenize_from_proto(fits, LIMITS) == [1] * 1000
        with pytest.raises(InvalidRequest, match="1001 token ids, at most 1000") as raised:
            detokenize_from_proto(pb.DetokenizeRequest(token_ids=[500] * 1001), LIMITS)
        assert raised.value.field == "token_ids"


class TestResponseFormats:
    def ask(self, form: pb.ResponseFormat, **sampling: Any) -> pb.GenerateRequest:
        message = pb.Message(role="user", parts=[text("hi")])
        return pb.GenerateRequest(
            messages=[message], response_format=form, sampling=pb.SamplingParams(**sampling)
        )

    @pytest.mark.parametrize(
        ("wire", "form"),
        [
            (pb.ResponseFormat(json_object=pb.JsonObject()), ResponseFormat(FormatKind.JSON_OBJECT)),
            (pb.ResponseFormat(json_schema="{}"), ResponseFormat(FormatKind.JSON_SCHEMA, "{}")),
            (pb.ResponseFormat(regex="a+"), ResponseFormat(FormatKind.REGEX, "a+")),
            (
                pb.ResponseFormat(choice=pb.TextChoice(texts=["a", "b"])),
                ResponseFormat(FormatKind.CHOICE, choices=("a", "b")),
            ),
        ],
    )
    def test_each_kind(self, wire: pb.ResponseFormat, form: ResponseFormat) -> None:
        assert response_format_from_proto(self.ask(wire)) == form

    def test_free_text_is_none(self) -> None:
        assert response_format_from_proto(pb.GenerateRequest()) is None

    def test_an_empty_one_and_ignored_end_tokens_are_refused(self) -> None:
        with pytest.raises(InvalidRequest) as refused:
            response_format_from_proto(self.ask(pb.ResponseFormat()))
        assert refused.value.field == "response_format"
        with pytest.raises(InvalidRequest) as refused:
            response_format_from_proto(self.ask(pb.ResponseFormat(regex="a"), ignore_eos=True))
        assert refused.value.field == "sampling.ignore_eos"


class TestTools:
    def ask(self, use: pb.ToolUse, **more: Any) -> pb.GenerateRequest:
        return pb.GenerateRequest(messages=[pb.Message(role="user", parts=[text("hi")])], tools=use, **more)

    def test_each_field(self) -> None:
        tool = pb.Tool(name="look", description="d", parameters="{}")
        use = pb.ToolUse(tools=[tool], choice=pb.TOOL_CHOICE_NAMED, name="look", single_call=True)
        expected = ToolUse((Tool("look", "d", "{}"),), ToolChoice.NAMED, "look", single_call=True)
        assert tool_use_from_proto(self.ask(use)) == expected
        assert tool_use_from_proto(pb.GenerateRequest()) is None
        some = tool_use_from_proto(self.ask(pb.ToolUse(tools=[tool], allowed=["look"])))
        assert some == ToolUse((Tool("look", "d", "{}"),), allowed=("look",))

    @pytest.mark.parametrize(
        ("use", "more", "field"),
        [
            (pb.ToolUse(), {}, "tools.tools"),
            (pb.ToolUse(tools=[pb.Tool(name="a b")]), {}, "tools.tools[0].name"),
            (pb.ToolUse(tools=[pb.Tool(name="a")], allowed=["b"]), {}, "tools.allowed[0]"),
            (
                pb.ToolUse(tools=[pb.Tool(name="a")], choice=pb.TOOL_CHOICE_REQUIRED),
                {"response_format": pb.ResponseFormat(regex="a")},
                "response_format",
            ),
            (
                pb.ToolUse(tools=[pb.Tool(name="a")], choice=pb.TOOL_CHOICE_REQUIRED),
                {"sampling": pb.SamplingParams(ignore_eos=True)},
                "sampling.ignore_eos",
            ),
        ],
    )
    def test_wrong_ones_are_refused_by_name(self, use: pb.ToolUse, more: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidRequest) as refused:
            tool_use_from_proto(self.ask(use, **more))
        assert refused.value.field == field

    def test_calls_of_the_history(self) -> None:
        wire = pb.Message(role="assistant", tool_calls=[pb.ToolCall(name="look", arguments="{}")])
        assert messages_from_proto([wire]) == [Message("assistant", (), (Call("look", "{}"),))]
