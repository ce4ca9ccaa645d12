"""Requests of the contract to plain values, with every limit that can be checked without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from llm_service.generation import GenerationInput, ImageInput
from llm_service.prompt import ImagePart, Message, TextPart
from llm_service.sampling_params import SamplingParams
from protos import encoder_pb2, language_model_pb2
from protos.errors import ContextLengthExceeded, InvalidRequest
from protos.preprocessing import Preprocessing
from protos.request_context import Metadata

MAX_CACHE_SALT_BYTES = 1024


@dataclass(frozen=True)
class RequestLimits:
    vocab_size: int
    max_model_len: int
    max_images: int
    max_image_tiles: int
    max_request_bytes: int


def generation_from_proto(
    request: language_model_pb2.GenerateRequest,
    preprocessing: Preprocessing,
    limits: RequestLimits,
    defaults: SamplingParams,
    metadata: Metadata,
) -> GenerationInput:
    """`defaults` are for unset sampling fields.  Raises InvalidRequest naming the first wrong field."""
    if bool(request.messages) == bool(request.prompt_token_ids):
        raise InvalidRequest("give either messages or prompt_token_ids", field="messages")
    if len(request.cache_salt) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest(f"cache_salt: at most {MAX_CACHE_SALT_BYTES} bytes", field="cache_salt")
    params = sampling_params_from_proto(request.sampling, defaults)
    params.validate(limits.vocab_size)
    if len(request.prompt_token_ids) >= limits.max_model_len:  # before anything walks over millions of them
        raise ContextLengthExceeded(
            f"the prompt has {len(request.prompt_token_ids)} tokens; "
            f"the context holds {limits.max_model_len}, completion included",
            field="prompt_token_ids",
        )
    _check_token_ids(request.prompt_token_ids, limits.vocab_size, "prompt_token_ids")
    messages = messages_from_proto(request.messages)
    images = list(_images(request.messages, preprocessing, limits))
    _check_images(images, limits)
    return GenerationInput(
        messages=messages,
        prompt_token_ids=list(request.prompt_token_ids),
        images=images,
        params=params,
        priority=request.priority,
        cache_salt=request.cache_salt,
        metadata=metadata,
    )


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
    """Images are numbered in the order they appear.  Raises InvalidRequest for an empty part."""
    indexes = count()
    return [
        Message(
            message.role,
            tuple(
                _part(part, indexes, f"messages[{position}].parts[{number}]")
                for number, part in enumerate(message.parts)
            ),
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


def _part(part: language_model_pb2.Part, indexes: Iterator[int], field: str) -> TextPart | ImagePart:
    kind = part.WhichOneof("part")
    if kind == "text":
        return TextPart(part.text)
    if kind == "image":
        return ImagePart(next(indexes))
    raise InvalidRequest("a part must be text or image", field=field)


def _images(
    messages: Iterable[language_model_pb2.Message], preprocessing: Preprocessing, limits: RequestLimits
) -> Iterator[ImageInput]:
    for position, message in enumerate(messages):
        for number, part in enumerate(message.parts):
            if part.WhichOneof("part") == "image":
                field = f"messages[{position}].parts[{number}].image"
                yield _image(part.image, preprocessing, limits, field)


def _image(
    image: language_model_pb2.Image, preprocessing: Preprocessing, limits: RequestLimits, field: str
) -> ImageInput:
    data = image.data  # every access copies
    if not data:
        raise InvalidRequest("the picture is empty", field=f"{field}.data")
    tiling = image.tiling
    min_tiles = _tiles(tiling, "min_tiles", preprocessing.min_tiles, limits, field)
    max_tiles = _tiles(tiling, "max_tiles", max(preprocessing.max_tiles, min_tiles), limits, field)
    if not tiling.HasField("min_tiles"):
        min_tiles = min(min_tiles, max_tiles)
    if min_tiles > max_tiles:
        raise InvalidRequest(
            f"min_tiles is {min_tiles}, must be at most max_tiles ({max_tiles})",
            field=f"{field}.tiling.min_tiles",
        )
    thumbnail = tiling.use_thumbnail if tiling.HasField("use_thumbnail") else preprocessing.use_thumbnail
    return ImageInput(data, min_tiles, max_tiles, thumbnail, field)


def _tiles(
    tiling: encoder_pb2.TilingOptions, name: str, default: int, limits: RequestLimits, field: str
) -> int:
    value: int = getattr(tiling, name) if tiling.HasField(name) else default
    if not 1 <= value <= max(limits.max_image_tiles, default):
        raise InvalidRequest(
            f"{name} is {value}, must be in [1, {limits.max_image_tiles}]", field=f"{field}.tiling.{name}"
        )
    return value


def _check_images(images: list[ImageInput], limits: RequestLimits) -> None:
    if len(images) > limits.max_images:
        raise InvalidRequest(
            f"{len(images)} pictures, at most {limits.max_images} are allowed",
            field=images[limits.max_images].field,
        )
    num_bytes = 0
    for image in images:
        num_bytes += len(image.data)
        if num_bytes > limits.max_request_bytes:
            raise InvalidRequest(
                f"at most {limits.max_request_bytes} bytes of pictures are allowed in a request",
                field=f"{image.field}.data",
            )


def _check_token_ids(token_ids: Iterable[int], vocab_size: int, field: str) -> None:
    for position, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside [0, {vocab_size - 1}]",
                field=f"{field}[{position}]",
            )
