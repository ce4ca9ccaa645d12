"""Protobuf to plain values and back; beside it only those who call the services see protobuf."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.completions_schema import CompletionRequest
from gateway.conversation import Clip, Document, Medium, Picture, Text, Turn, is_upload
from gateway.errors import RequestError
from gateway.events import CallDelta, Delta, Event, Finished, Part, Started, Timings, TokenLogprob, Usage
from gateway.format_schema import FormatFields
from gateway.model_info import ModelInfo
from gateway.schema import ChatCompletionRequest, SamplingFields
from gateway.tool_schema import AllowedToolsChoice, NamedTool, ToolFields
from protos import encoder_pb2, language_model_pb2
from protos.errors import ModelError
from protos.options import MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES

_FINISH_REASONS = {
    language_model_pb2.FINISH_REASON_STOP: "stop",
    language_model_pb2.FINISH_REASON_LENGTH: "length",
    language_model_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_TOOL_CHOICES = {
    "auto": language_model_pb2.TOOL_CHOICE_AUTO,
    "none": language_model_pb2.TOOL_CHOICE_NONE,
    "required": language_model_pb2.TOOL_CHOICE_REQUIRED,
}
# Fields of ToolUse -> paths into the JSON body.
_TOOL_PARAMS = (
    (re.compile(r"tools\.tools\[(\d+)\]\.(\w+)"), r"tools.\1.function.\2"),
    (re.compile(r"tools\.allowed\[(\d+)\]"), r"tool_choice.allowed_tools.tools.\1.function.name"),
    (re.compile(r"tools\.name"), "tool_choice.function.name"),
    (re.compile(r"tools\.tools.*"), "tools"),
    (re.compile(r"tools\..*"), "tool_choice"),
)
# Fields that JSON and protobuf call the same.
_SAME_NAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
_PART_PARAMS = {
    ".image.tiling.min_tiles": ".image_url.min_dynamic_patch",
    ".image.tiling.max_tiles": ".image_url.max_dynamic_patch",
    ".image.tiling.use_thumbnail": ".image_url.use_thumbnail",
    ".video.tiling.max_tiles": ".video_url.max_dynamic_patch",
    ".video.sampling.num_frames": ".video_url.num_frames",
    ".video.sampling.fps": ".video_url.fps",
    ".video.sampling.start_s": ".video_url.start_s",
    ".video.sampling.end_s": ".video_url.end_s",
}
# More than a role, or than tiling options and tags with lengths, take in a message.
MESSAGE_OVERHEAD_BYTES = 64
_MESSAGE_FIELD = re.compile(r"messages\[(\d+)\](?:\.(\w+)(?:\[(\d+)\](.*))?)?")


def generate_request(
    chat: ChatCompletionRequest, turns: Sequence[Turn], request_id: str
) -> language_model_pb2.GenerateRequest:
    """The call that answers `chat`, whose messages were read into `turns`.

    Raises:
        RequestError: larger than one gRPC message may be.
    """
    request = language_model_pb2.GenerateRequest(
        request_id=request_id,
        sampling=_sampling(chat),
        priority=chat.priority or 0,
        cache_salt=(chat.cache_salt or "").encode(),
    )
    _set_format(request, chat)
    _set_tools(request, chat)
    if chat.thinking is not None:
        request.thinking.enabled = chat.thinking
    most_bytes = request.ByteSize() + sum(map(_most_bytes, turns))
    for turn in turns:
        _fill(request.messages.add(role=turn.role), turn)
    # In this order: protobuf serializes a message to tell its size.
    if most_bytes > MAX_MESSAGE_BYTES and request.ByteSize() > MAX_MESSAGE_BYTES:
        message = f"The request is larger than {MAX_MESSAGE_BYTES} bytes once decoded."
        raise RequestError(message, code="request_too_large", status=413)
    return request


def _most_bytes(turn: Turn) -> int:
    """At least what the turn takes in a message; a character takes at most 4 bytes of UTF-8."""
    calls = sum(4 * len(call.name) + 4 * len(call.arguments) for call in turn.calls)
    num_pieces = 1 + len(turn.parts) + len(turn.calls)
    return MESSAGE_OVERHEAD_BYTES * num_pieces + sum(map(_size, turn.parts)) + calls


def _size(part: Text | Medium) -> int:
    if isinstance(part, Text):
        return 4 * len(part.text)
    if part.url:
        return len(part.url)
    return 0 if is_upload(part) else len(part.data)


def _fill(message: language_model_pb2.Message, turn: Turn) -> None:
    """In place: protobuf copies what it is given, at every level, and pictures are megabytes."""
    for call in turn.calls:
        message.tool_calls.add(name=call.name, arguments=call.arguments)
    for part in turn.parts:
        added = message.parts.add()
        if isinstance(part, Text):
            added.text = part.text
            continue
        if isinstance(part, Picture):
            _fill_picture(added.image, part)
        elif isinstance(part, Clip):
            _fill_clip(added.video, part)
        else:
            _fill_document(added.document, part)


def _fill_picture(image: language_model_pb2.Image, picture: Picture) -> None:
    tiling = encoder_pb2.TilingOptions(min_tiles=picture.min_tiles, max_tiles=picture.max_tiles)
    if picture.use_thumbnail is not None:
        tiling.use_thumbnail = picture.use_thumbnail
    image.tiling.CopyFrom(tiling)
    if picture.url:
        image.url = picture.url
    else:
        image.data = picture.data


def _fill_clip(video: language_model_pb2.Video, clip: Clip) -> None:
    video.tiling.CopyFrom(encoder_pb2.TilingOptions(max_tiles=clip.max_tiles))
    sampling = encoder_pb2.FrameSampling(
        num_frames=clip.num_frames, fps=clip.fps, start_s=clip.start_s, end_s=clip.end_s
    )
    video.sampling.CopyFrom(sampling)
    _fill_source(video, clip)


def _fill_document(document: language_model_pb2.Document, plain: Document) -> None:
    document.tiling.CopyFrom(encoder_pb2.TilingOptions(max_tiles=plain.max_tiles))
    _fill_source(document, plain)


def _fill_source(
    message: language_model_pb2.Video | language_model_pb2.Document, medium: Clip | Document
) -> None:
    if medium.url:
        message.url = medium.url
    elif medium.upload:
        message.upload = medium.upload
    else:
        message.data = medium.data


def prompt_request(
    completion: CompletionRequest, prompt: Sequence[int], request_id: str
) -> language_model_pb2.GenerateRequest:
    """The call that goes on with the token ids of `prompt`."""
    request = language_model_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=_prompt_sampling(completion),
        priority=completion.priority or 0,
        cache_salt=(completion.cache_salt or "").encode(),
    )
    _set_format(request, completion)
    return request


def _set_format(request: language_model_pb2.GenerateRequest, fields: FormatFields) -> None:
    for asked in fields.formats:
        wire = request.response_format
        if asked.kind == "json_object":
            wire.json_object.SetInParent()
        elif asked.kind == "choice":
            wire.choice.texts.extend(asked.choices)
        else:
            setattr(wire, asked.kind, asked.text)


def _set_tools(request: language_model_pb2.GenerateRequest, fields: ToolFields) -> None:
    for tool in fields.tools or ():
        function = tool.function
        parameters = (
            None if function.parameters is None else json.dumps(function.parameters, ensure_ascii=False)
        )
        request.tools.tools.add(name=function.name, description=function.description, parameters=parameters)
    if not fields.tools:
        return
    choice, wire = fields.tool_choice, request.tools
    wire.single_call = fields.parallel_tool_calls is False
    if isinstance(choice, NamedTool):
        wire.choice, wire.name = language_model_pb2.TOOL_CHOICE_NAMED, choice.function.name
    elif isinstance(choice, AllowedToolsChoice):
        wire.choice = _TOOL_CHOICES[choice.allowed_tools.mode]
        wire.allowed.extend(tool.function.name for tool in choice.allowed_tools.tools)
    else:
        wire.choice = _TOOL_CHOICES[choice or "auto"]


def tokenize_request(text: str) -> language_model_pb2.TokenizeRequest:
    return language_model_pb2.TokenizeRequest(text=text)


def tokenize_turns_request(turns: Sequence[Turn]) -> language_model_pb2.TokenizeRequest:
    """Ids of a conversation without media, through the chat template."""
    request = language_model_pb2.TokenizeRequest()
    for turn in turns:
        _fill(request.messages.messages.add(role=turn.role), turn)
    return request


def detokenize_request(tokens: Sequence[int]) -> language_model_pb2.DetokenizeRequest:
    return language_model_pb2.DetokenizeRequest(token_ids=tokens)


def uploads_of(turns: Sequence[Turn]) -> list[bytes]:
    """What must be uploaded before the request is sent, each medium once however often it is shown."""
    parts = [part for turn in turns for part in turn.parts]
    media = [part for part in parts if isinstance(part, Clip | Document) and part.upload]
    return list({part.upload: part.data for part in media}.values())


def upload_messages(data: bytes, cache_salt: bytes) -> Iterator[language_model_pb2.UploadMediaRequest]:
    yield language_model_pb2.UploadMediaRequest(cache_salt=cache_salt, num_bytes=len(data))
    for start in range(0, len(data), MAX_CHUNK_BYTES):
        yield language_model_pb2.UploadMediaRequest(data=data[start : start + MAX_CHUNK_BYTES])


def _sampling(chat: ChatCompletionRequest) -> language_model_pb2.SamplingParams:
    logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    return _sampling_params(chat, _max_tokens(chat), logprobs)


def _prompt_sampling(completion: CompletionRequest) -> language_model_pb2.SamplingParams:
    return _sampling_params(completion, completion.max_tokens, completion.logprobs)


def _sampling_params(
    request: SamplingFields, max_tokens: int | None, logprobs: int | None
) -> language_model_pb2.SamplingParams:
    fields: dict[str, Any] = {name: getattr(request, name) for name in _SAME_NAME}
    fields |= {"max_tokens": max_tokens, "logprobs": logprobs}
    fields["logit_bias"] = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
    if request.min_tokens is None:
        fields["min_tokens"] = request.min_new_tokens
    given = {name: value for name, value in fields.items() if value is not None}
    return language_model_pb2.SamplingParams(**given)


def _max_tokens(chat: ChatCompletionRequest) -> int | None:
    return chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens


def param_of(field: str, chat: ChatCompletionRequest, turns: Sequence[Turn]) -> str | None:
    """Path into the JSON body of a field of GenerateRequest; None where the body has none."""
    if match := _MESSAGE_FIELD.fullmatch(field):
        return _message_param(match, turns)
    for pattern, param in _TOOL_PARAMS:
        if match := pattern.fullmatch(field):
            return match.expand(param)
    if field.startswith("response_format") and chat.formats:
        return chat.formats[0].param
    name = re.sub(r"\[.*", "", field.removeprefix("sampling."))
    if name == "max_tokens" and chat.max_completion_tokens is not None:
        return "max_completion_tokens"
    if name == "min_tokens" and chat.min_tokens is None:
        return "min_new_tokens"
    if name == "logprobs":
        return "top_logprobs"
    return name if name == "messages" or name in SamplingFields.model_fields else None


def prompt_param_of(field: str, completion: CompletionRequest) -> str | None:
    """The same for a request that `prompt_request` made."""
    if field.startswith("response_format") and completion.formats:
        return completion.formats[0].param
    name = re.sub(r"\[.*", "", field.removeprefix("sampling."))
    if name == "prompt_token_ids":
        return "prompt"
    if name == "min_tokens" and completion.min_tokens is None:
        return "min_new_tokens"
    return name if name in type(completion).model_fields else None


def _message_param(match: re.Match[str], turns: Sequence[Turn]) -> str:
    index, field, position, rest = match.groups()
    turn = turns[int(index)] if int(index) < len(turns) else Turn("", ())
    message, parts = turn.param or f"messages.{index}", turn.parts
    if field == "role":
        return f"{message}.role"
    if position is None or int(position) >= len(parts):
        return f"{message}.content" if field == "parts" else message
    part = parts[int(position)]
    if isinstance(part, Text):
        return part.param
    if rest == ".document.tiling.max_tiles":  # beside the data, which an input_file has one level higher
        return part.url_param.rpartition(".")[0] + ".max_dynamic_patch"
    if rest in _PART_PARAMS:
        return part.param + _PART_PARAMS[rest]
    return part.url_param if rest.startswith((".image", ".video", ".document")) else part.param


def event_from_proto(
    message: language_model_pb2.GenerateResponse | language_model_pb2.SessionEvent,
) -> Event:
    """Raises ModelError for an event that this contract does not have."""
    kind = message.WhichOneof("event")
    if kind == "delta":
        return _delta(message.delta)
    if kind == "started":
        return Started(message.started.prompt_tokens, tuple(map(_parts, message.started.media)))
    if kind == "finished":
        if message.finished.reason not in _FINISH_REASONS:
            raise ModelError("the language model ended for a reason that this gateway does not know")
        finished = message.finished
        return Finished(finished.index, _FINISH_REASONS[finished.reason], finished.stop_string)
    if kind == "usage":
        usage = message.usage
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            image_tokens=usage.visual_tokens,
            timings=_timings(usage.timings) if usage.HasField("timings") else None,
        )
    raise ModelError("the language model sent an event that this gateway does not know")


def _parts(medium: language_model_pb2.MediumParts) -> tuple[Part, ...]:
    return tuple(
        Part(
            part.width,
            part.height,
            part.columns,
            part.rows,
            part.has_thumbnail,
            part.num_tiles,
            part.timestamp_s,
        )
        for part in medium.parts
    )


def _timings(timings: language_model_pb2.GenerateTimings) -> Timings:
    return Timings(
        layout=timings.layout_ns / 1e6,
        encode=timings.encode_ns / 1e6,
        queue=timings.queue_ns / 1e6,
        prefill=timings.prefill_ns / 1e6,
        decode=timings.decode_ns / 1e6,
        total=timings.total_ns / 1e6,
    )


def _delta(delta: language_model_pb2.Delta) -> Delta:
    calls = delta.tool_calls
    return Delta(
        delta.index,
        delta.text,
        len(delta.token_ids),
        _logprobs(delta) if delta.logprobs else (),
        delta.reasoning,
        tuple(CallDelta(call.index, call.arguments, call.name) for call in calls) if calls else (),
    )


def _logprobs(delta: language_model_pb2.Delta) -> tuple[TokenLogprob, ...]:
    return tuple(_token(entry.token, tuple(_token(top) for top in entry.top)) for entry in delta.logprobs)


def _token(entry: language_model_pb2.Logprob, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(entry.text, entry.logprob, entry.raw, top)


def model_info_from_proto(response: language_model_pb2.GetLanguageModelResponse) -> ModelInfo:
    return ModelInfo(
        id=response.model,
        max_model_len=response.max_model_len,
        max_images=response.max_images,
        max_media_bytes=response.max_request_bytes,
        max_tiles=response.max_tiles,
        encoders_ready=response.encoders_ready,
        max_upload_bytes=response.max_upload_bytes,
    )
