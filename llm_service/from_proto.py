"""Requests of the contract to plain values, with every limit that can be checked without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from llm_service.generation_input import GenerationInput, MediumInput
from llm_service.prompt import DocumentPart, ImagePart, MediaPart, Message, TextPart, VideoPart
from llm_service.response_format import FormatKind, ResponseFormat
from llm_service.sampling_params import SamplingParams
from llm_service.templates import Call
from llm_service.tools import Tool, ToolChoice, ToolUse
from protos import encoder_pb2, language_model_pb2
from protos.errors import ContextLengthExceeded, InvalidRequest, NotFound
from protos.media import DEFAULT_NUM_FRAMES, FrameSampling, MediaKind
from protos.options import MAX_URL_CHARS
from protos.preprocessing import Preprocessing
from protos.request_context import Metadata

MAX_CACHE_SALT_BYTES = 1024

_WireMedium = language_model_pb2.Image | language_model_pb2.Video | language_model_pb2.Document
# (cache salt, SHA-256) to the medium that was uploaded; None where there is none.
FindUpload = Callable[[bytes, bytes], bytes | None]

_PARTS: dict[str, Callable[[int], MediaPart]] = {
    "image": ImagePart,
    "video": VideoPart,
    "document": DocumentPart,
}
_TOOL_CHOICES = {
    language_model_pb2.TOOL_CHOICE_AUTO: ToolChoice.AUTO,
    language_model_pb2.TOOL_CHOICE_NONE: ToolChoice.NONE,
    language_model_pb2.TOOL_CHOICE_REQUIRED: ToolChoice.REQUIRED,
    language_model_pb2.TOOL_CHOICE_NAMED: ToolChoice.NAMED,
}
_NAMES = {MediaKind.IMAGE: "picture", MediaKind.VIDEO: "video", MediaKind.DOCUMENT: "document"}
_SAMPLING_FIELDS = ("num_frames", "fps", "start_s", "end_s")


@dataclass(frozen=True)
class RequestLimits:
    vocab_size: int
    max_model_len: int
    max_images: int
    max_image_tiles: int
    max_request_bytes: int
    max_video_frames: int


def generation_from_proto(
    request: language_model_pb2.GenerateRequest,
    preprocessing: Preprocessing,
    limits: RequestLimits,
    defaults: SamplingParams,
    metadata: Metadata,
    find_upload: FindUpload,
) -> GenerationInput:
    """`defaults` are for unset sampling fields.

    Raises:
        InvalidRequest, NotFound: name the first wrong field.
    """
    if bool(request.messages) == bool(request.prompt_token_ids):
        raise InvalidRequest("give either messages or prompt_token_ids", field="messages")
    if len(request.cache_salt) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest(f"cache_salt: at most {MAX_CACHE_SALT_BYTES} bytes", field="cache_salt")
    params = sampling_params_from_proto(request.sampling, defaults)
    params.validate(limits.vocab_size)
    _check_prompt(request.prompt_token_ids, limits)
    response_format = response_format_from_proto(request)
    messages = messages_from_proto(request.messages)
    media = list(_media(request, preprocessing, limits, find_upload))
    return GenerationInput(
        messages=messages,
        prompt_token_ids=list(request.prompt_token_ids),
        media=media,
        params=params,
        priority=request.priority,
        cache_salt=request.cache_salt,
        metadata=metadata,
        response_format=response_format,
        tools=tool_use_from_proto(request),
        thinking=request.thinking.enabled if request.HasField("thinking") else None,
    )


def _check_prompt(token_ids: Sequence[int], limits: RequestLimits) -> None:
    if len(token_ids) >= limits.max_model_len:  # before anything walks over millions of them
        raise ContextLengthExceeded(
            f"the prompt has {len(token_ids)} tokens; "
            f"the context holds {limits.max_model_len}, completion included",
            field="prompt_token_ids",
        )
    _check_token_ids(token_ids, limits.vocab_size, "prompt_token_ids")


def tool_use_from_proto(request: language_model_pb2.GenerateRequest) -> ToolUse | None:
    """None without tools.  Raises InvalidRequest, also for a forced call together with a response format."""
    if not request.HasField("tools"):
        return None
    wire = request.tools
    if wire.choice not in _TOOL_CHOICES:
        raise InvalidRequest("choice: unknown", field="tools.choice")
    tools = tuple(Tool(tool.name, tool.description, tool.parameters) for tool in wire.tools)
    use = ToolUse(tools, _TOOL_CHOICES[wire.choice], wire.name, wire.single_call, tuple(wire.allowed))
    use.validate()
    if use.choice in (ToolChoice.REQUIRED, ToolChoice.NAMED):
        if request.HasField("response_format"):
            raise InvalidRequest("an answer is either a call or in a format", field="response_format")
        if request.sampling.ignore_eos:
            raise InvalidRequest("ignore_eos: an answer ends with its calls", field="sampling.ignore_eos")
    return use


def response_format_from_proto(request: language_model_pb2.GenerateRequest) -> ResponseFormat | None:
    """None for free text.  Raises InvalidRequest where the end tokens are to be ignored."""
    name = request.response_format.WhichOneof("format")
    if name is None:
        if request.HasField("response_format"):
            raise InvalidRequest("response_format: name one format", field="response_format")
        return None
    if request.sampling.ignore_eos:
        raise InvalidRequest(
            "ignore_eos: an answer in a response format ends with its format", field="sampling.ignore_eos"
        )
    kind = FormatKind(name)
    if kind is FormatKind.CHOICE:
        return ResponseFormat(kind, choices=tuple(request.response_format.choice.texts))
    text = "" if kind is FormatKind.JSON_OBJECT else str(getattr(request.response_format, name))
    return ResponseFormat(kind, text)


def detokenize_from_proto(request: language_model_pb2.DetokenizeRequest, limits: RequestLimits) -> list[int]:
    """The token ids.  Raises InvalidRequest for more than a context, or one outside the vocabulary."""
    if len(request.token_ids) > limits.max_model_len:
        raise InvalidRequest(
            f"{len(request.token_ids)} token ids, at most {limits.max_model_len} are allowed",
            field="token_ids",
        )
    _check_token_ids(request.token_ids, limits.vocab_size, "token_ids")
    return list(request.token_ids)


def messages_from_proto(messages: Iterable[language_model_pb2.Message]) -> list[Message]:
    """Media are numbered in the order they appear.  Raises InvalidRequest for an empty part."""
    indexes = count()
    return [
        Message(
            message.role,
            tuple(
                _part(part, indexes, f"messages[{position}].parts[{number}]")
                for number, part in enumerate(message.parts)
            ),
            tuple(Call(call.name, call.arguments) for call in message.tool_calls),
        )
        for position, message in enumerate(messages)
    ]


def sampling_params_from_proto(
    sampling: language_model_pb2.SamplingParams, defaults: SamplingParams
) -> SamplingParams:
    """Unset fields take the defaults, and no default contradicts what was set."""
    optional = {
        name: getattr(sampling, name) if sampling.HasField(name) else getattr(defaults, name)
        for name in (
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "seed",
            "n",
            "logprobs",
            "skip_special_tokens",
        )
    }
    if not sampling.HasField("max_tokens") and defaults.max_tokens is not None:
        optional["max_tokens"] = max(defaults.max_tokens, sampling.min_tokens)
    return SamplingParams(
        **optional,
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
    )


def _part(part: language_model_pb2.Part, indexes: Iterator[int], field: str) -> TextPart | MediaPart:
    kind = part.WhichOneof("part")
    if kind == "text":
        return TextPart(part.text)
    if kind in _PARTS:
        return _PARTS[kind](next(indexes))
    raise InvalidRequest("a part must be text, image, video or document", field=field)


def _media(
    request: language_model_pb2.GenerateRequest,
    preprocessing: Preprocessing,
    limits: RequestLimits,
    find_upload: FindUpload,
) -> Iterator[MediumInput]:
    """With every limit of one medium and of all."""
    num_media = num_inline_bytes = 0
    for position, message in enumerate(request.messages):
        for number, part in enumerate(message.parts):
            name = part.WhichOneof("part")
            if name not in _PARTS:
                continue
            field = f"messages[{position}].parts[{number}].{name}"
            num_media += 1
            if num_media > limits.max_images:
                raise InvalidRequest(f"more than {limits.max_images} pictures are not allowed", field=field)
            wire: _WireMedium = getattr(part, name)
            data = _data(wire, MediaKind(name), request.cache_salt, find_upload, field)
            num_inline_bytes += len(data) if wire.WhichOneof("source") == "data" else 0
            if num_inline_bytes > limits.max_request_bytes:
                raise InvalidRequest(
                    f"at most {limits.max_request_bytes} bytes of media are allowed in a request",
                    field=f"{field}.data",
                )
            yield _medium(wire, data, MediaKind(name), preprocessing, limits, field)


def _data(
    medium: _WireMedium, kind: MediaKind, cache_salt: bytes, find_upload: FindUpload, field: str
) -> bytes:
    source = medium.WhichOneof("source")
    if source == "url":
        if not 1 <= len(medium.url) <= MAX_URL_CHARS or not medium.url.isascii():
            message = f"the URL must have 1 to {MAX_URL_CHARS} characters of ASCII"
            raise InvalidRequest(message, field=f"{field}.url")
        return b""
    if source != "upload":
        data: bytes = medium.data  # every access copies
        if not data:
            raise InvalidRequest(f"the {_NAMES[kind]} is empty", field=f"{field}.data")
        return data
    found = find_upload(cache_salt, medium.upload)
    if found is None:
        message = "there is no such upload under this cache salt, or it has been forgotten"
        raise NotFound(message, field=f"{field}.upload")
    return found


def _medium(
    medium: _WireMedium,
    data: bytes,
    kind: MediaKind,
    preprocessing: Preprocessing,
    limits: RequestLimits,
    field: str,
) -> MediumInput:
    tiling = medium.tiling
    default_max = 1 if kind is MediaKind.VIDEO else preprocessing.max_tiles
    default_min = min(preprocessing.min_tiles, default_max)
    min_tiles = _tiles(tiling, "min_tiles", default_min, limits, field)
    max_tiles = _tiles(tiling, "max_tiles", max(default_max, min_tiles), limits, field)
    if not tiling.HasField("min_tiles"):
        min_tiles = min(min_tiles, max_tiles)
    if min_tiles > max_tiles:
        raise InvalidRequest(
            f"min_tiles is {min_tiles}, must be at most max_tiles ({max_tiles})",
            field=f"{field}.tiling.min_tiles",
        )
    thumbnail = tiling.use_thumbnail if tiling.HasField("use_thumbnail") else preprocessing.use_thumbnail
    sampling = None
    if isinstance(medium, language_model_pb2.Video):
        sampling = _sampling(medium.sampling, limits.max_video_frames, f"{field}.sampling")
    return MediumInput(data, min_tiles, max_tiles, thumbnail, field, kind, sampling, medium.url)


def _sampling(sampling: encoder_pb2.FrameSampling, max_frames: int, field: str) -> FrameSampling:
    """At a number of frames a second, as many as are allowed."""
    given = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS if sampling.HasField(name)}
    given.setdefault("num_frames", max_frames if "fps" in given else min(DEFAULT_NUM_FRAMES, max_frames))
    if given.get("fps") == 0:
        raise InvalidRequest("fps must be above 0", field=f"{field}.fps")
    if given["num_frames"] > max_frames:
        message = f"num_frames is {given['num_frames']}, must be in [1, {max_frames}]"
        raise InvalidRequest(message, field=f"{field}.num_frames")
    try:
        return FrameSampling(**given)
    except ValueError as error:
        raise InvalidRequest(str(error), field=f"{field}.{str(error).partition(' ')[0]}") from None


def _tiles(
    tiling: encoder_pb2.TilingOptions, name: str, default: int, limits: RequestLimits, field: str
) -> int:
    value: int = getattr(tiling, name) if tiling.HasField(name) else default
    if not 1 <= value <= max(limits.max_image_tiles, default):
        raise InvalidRequest(
            f"{name} is {value}, must be in [1, {limits.max_image_tiles}]", field=f"{field}.tiling.{name}"
        )
    return value


def _check_token_ids(token_ids: Iterable[int], vocab_size: int, field: str) -> None:
    for position, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside [0, {vocab_size - 1}]",
                field=f"{field}[{position}]",
            )
