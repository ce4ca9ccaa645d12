"""The request bodies of the OpenAI API, checked field by field.  Knows nothing about protobuf or HTTP.

Verdicts (supported, ignored, refused) follow the field table of the API's documentation and vLLM's
extensions: what would silently change the answer is refused, what would not is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from gateway.format_schema import FormatFields
from gateway.strict_model import StrictModel, text_or_list
from gateway.tool_schema import CalledFunction, CalledTool, ToolFields

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 4096
MAX_STOP_TOKENS = 1024
MAX_CACHE_SALT_BYTES = 1024
_UINT32_MAX = 2**32 - 1
_INT31 = 2**31

PART_TYPES = "text, image_url, input_image, video_url, file, input_file"

PositiveInt = Annotated[int, Field(ge=1, le=_UINT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=_UINT32_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Detail = Literal["auto", "low", "high", "original"]


class TextPart(StrictModel):
    type: Literal["text", "input_text", "output_text"] = "text"
    text: str


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str


class ThinkingPart(StrictModel):
    """Earlier reasoning; templates drop it."""

    type: Literal["thinking"]


class ImageUrl(StrictModel):
    url: str
    detail: Detail | None = None
    max_dynamic_patch: PositiveInt | None = None
    min_dynamic_patch: PositiveInt | None = None
    use_thumbnail: bool | None = None


_ImageUrlValue = Annotated[
    Annotated[str, Tag("#url")] | Annotated[ImageUrl, Tag("#object")],
    Discriminator(lambda value: "#url" if isinstance(value, str) else "#object"),
]


class ImagePart(StrictModel):
    """`image_url` of chat, or `input_image` of responses, whose options sit beside the URL."""

    type: Literal["image_url", "input_image"] = "image_url"
    image_url: _ImageUrlValue
    detail: Detail | None = None

    @property
    def image(self) -> ImageUrl:
        if isinstance(self.image_url, ImageUrl):
            return self.image_url
        return ImageUrl(url=self.image_url, detail=self.detail)


class VideoOptions(StrictModel):
    """As vLLM, SGLang and LMDeploy name them."""

    num_frames: PositiveInt | None = None
    fps: Annotated[float, Field(gt=0)] | None = None


class VideoUrl(VideoOptions):
    url: str
    start_s: Annotated[float, Field(ge=0)] | None = None
    end_s: Annotated[float, Field(gt=0)] | None = None
    max_dynamic_patch: PositiveInt | None = None  # of each frame


class VideoPart(StrictModel):
    type: Literal["video_url"] = "video_url"
    video_url: VideoUrl

    @field_validator("video_url", mode="before")
    @classmethod
    def _one_url_is_enough(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class FileData(StrictModel):
    """Of OpenAI's keys `file_id` names what only a store could give; `file_data` wins over `file_url`."""

    file_url: str | None = None
    file_data: Annotated[str | None, Field(validate_default=True)] = None
    filename: str | None = None
    max_dynamic_patch: PositiveInt | None = None  # of each page

    @model_validator(mode="before")
    @classmethod
    def _refuse_references(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("file_id") is not None and "file_data" not in value:
            raise PydanticCustomError(
                "unsupported_value", "must have 'file_data'; this server stores no files"
            )
        return value

    @field_validator("file_data")
    @classmethod
    def _has_a_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("file_url") is None:
            raise PydanticKnownError("missing")
        return value


class FilePart(StrictModel):
    """`file` of chat, or `input_file` of responses, whose fields stand beside the type."""

    type: Literal["file"] = "file"
    file: FileData


class InputFilePart(FileData):
    type: Literal["input_file"]

    @property
    def file(self) -> FileData:
        return self


_PART_TAGS = {
    "text": "#text",
    "input_text": "#text",
    "output_text": "#text",
    "image_url": "#image",
    "input_image": "#image",
    "video_url": "#video",
    "file": "#file",
    "input_file": "#input_file",
    "refusal": "#refusal",
    "thinking": "#thinking",
}


def _part_tag(value: Any) -> str | None:
    """Tags start with '#', so that parsing.py can leave them out of the paths it reports."""
    if not isinstance(value, Mapping):
        return "#text"
    if "type" in value:
        kind = value["type"]
        return _PART_TAGS.get(kind) if isinstance(kind, str) else None
    return next((_PART_TAGS[key] for key in ("text", "image_url", "video_url", "file") if key in value), None)


Part = Annotated[
    Annotated[TextPart, Tag("#text")]
    | Annotated[ImagePart, Tag("#image")]
    | Annotated[VideoPart, Tag("#video")]
    | Annotated[FilePart, Tag("#file")]
    | Annotated[InputFilePart, Tag("#input_file")]
    | Annotated[RefusalPart, Tag("#refusal")]
    | Annotated[ThinkingPart, Tag("#thinking")],
    Discriminator(
        _part_tag,
        custom_error_type="unsupported_content_part",
        custom_error_message=f"must be one of the supported content part types: {PART_TYPES}",
    ),
]


Content = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Part], Tag("#list")],
    Discriminator(
        text_or_list,
        custom_error_type="content_type",
        custom_error_message="must be a string or an array of content parts",
    ),
]


class ChatMessage(StrictModel):
    """Earlier reasoning beside the content is no field: templates drop it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    tool_calls: list[CalledTool] | None = None
    function_call: CalledFunction | None = None  # the older form of one call
    tool_call_id: str | None = None

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _only_assistants_call(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") != "assistant":
            raise PydanticCustomError("unsupported_parameter", "belongs in assistant messages")
        return value

    @property
    def calls(self) -> list[CalledTool]:
        if self.function_call is not None:
            return [CalledTool(function=self.function_call)]
        return self.tool_calls or []


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_details: bool | None = None


_STOP_STRING = {"type": "string", "minLength": 1}
_STOP_STRINGS = {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}
_STOP_SCHEMA = {"anyOf": [_STOP_STRING, _STOP_STRINGS, {"type": "null"}]}


class SamplingFields(StrictModel):
    """Sampling parameters that every generating endpoint shares."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_INT31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[list[str] | None, WithJsonSchema(_STOP_SCHEMA)] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    max_tokens: PositiveInt | None = None
    min_tokens: TokenId | None = None
    min_new_tokens: TokenId | None = None  # LMDeploy's word for min_tokens
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    prompt_cache_key: str | None = None
    priority: Annotated[int, Field(ge=-_INT31, lt=_INT31)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str] | None) -> list[str] | None:
        if stop and len(stop) > MAX_STOP_STRINGS:
            raise PydanticCustomError("stop", f"must have at most {MAX_STOP_STRINGS} stop strings")
        if stop and not all(stop):
            raise PydanticCustomError("stop", "must not contain an empty string")
        return stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_number(cls, bias: Any) -> Any:
        """Before any is looked at: each fault would be kept."""
        if isinstance(bias, Mapping) and len(bias) > MAX_BIASES:
            raise PydanticCustomError("logit_bias", f"must have at most {MAX_BIASES} token ids")
        return bias

    @field_validator("logit_bias")
    @classmethod
    def _check_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= _UINT32_MAX):
                raise PydanticCustomError("logit_bias", "must have token ids as keys")
        return bias

    @field_validator("cache_salt")
    @classmethod
    def _check_cache_salt(cls, salt: str | None) -> str | None:
        if salt is not None and len(salt.encode()) > MAX_CACHE_SALT_BYTES:
            raise PydanticCustomError("cache_salt", f"must be at most {MAX_CACHE_SALT_BYTES} bytes long")
        return salt


class MediaIoKwargs(StrictModel):
    """vLLM's and LMDeploy's options for all media of a kind; those in a part win."""

    model_config = ConfigDict(extra="forbid")

    video: VideoOptions | None = None


class MmProcessorKwargs(StrictModel):
    """vLLM's and LMDeploy's options for all pictures; those in a part win, and so does `detail`."""

    model_config = ConfigDict(extra="forbid")

    max_dynamic_patch: PositiveInt | None = None
    min_dynamic_patch: PositiveInt | None = None
    use_thumbnail: bool | None = None
    dynamic_image_size: bool | None = None  # false: one tile

    @model_validator(mode="after")
    def _ordered(self) -> MmProcessorKwargs:
        if self.max_tiles is not None and (self.min_dynamic_patch or 1) > self.max_tiles:
            text = f"must have a min_dynamic_patch of at most {self.max_tiles}"
            raise PydanticCustomError("tiles", text)
        return self

    @property
    def max_tiles(self) -> int | None:
        return 1 if self.dynamic_image_size is False else self.max_dynamic_patch


class ChatTemplateKwargs(StrictModel):
    """vLLM's and LMDeploy's way to options of templates."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool | None = None


class ThinkingFields(StrictModel):
    """Three ways to say the same; the first that is given holds."""

    chat_template_kwargs: ChatTemplateKwargs | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @property
    def thinking(self) -> bool | None:
        """None: the model's own habit."""
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        if self.enable_thinking is not None or self.reasoning_effort is None:
            return self.enable_thinking
        return self.reasoning_effort != "none"


class ChatCompletionRequest(SamplingFields, FormatFields, ToolFields, ThinkingFields):
    """Body of `POST /v1/chat/completions`.  Undeclared keys are kept: see `refused_key`, `unknown_keys`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    service_tier: str | None = None
    media_io_kwargs: MediaIoKwargs | None = None
    mm_processor_kwargs: MmProcessorKwargs | None = None


# Key -> values that ask for nothing; any other value is refused, unless the body has a field of that name.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "reasoning_effort": (None, "none"),
    "enable_thinking": (None, False),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}, {"enable_thinking": False}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "structured_outputs": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "json_schema": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "logits_processors": (None, []),
    "mm_processor_kwargs": (None, {}),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "return_routed_experts": (None, False),
    "do_preprocess": (None, True),
    "input_ids": (None,),
    "image_data": (None,),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
    "vllm_xargs": (None, {}),
    "output_format": (None,),
    "mcp_servers": (None, []),
}
_REFUSED_PREFIX = "guided_"
# Known, and without influence on the answer.
_IGNORED = frozenset(
    {
        "store",
        "metadata",
        "user",
        "safety_identifier",
        "prompt_cache_options",
        "prompt_cache_retention",
        "verbosity",
        "parallel_tool_calls",
        "documents",
        "add_special_tokens",
        "spaces_between_special_tokens",
        "request_id",
        "session_id",
    }
)


def refused_key(extra: Mapping[str, Any]) -> str | None:
    """The first key that asks for something this server cannot do, if there is one."""
    for key, value in extra.items():
        harmless = (None,) if key.startswith(_REFUSED_PREFIX) else _REFUSED.get(key)
        if harmless is not None and value not in harmless:
            return key
    return None


def unknown_keys(extra: Mapping[str, Any]) -> list[str]:
    """Keys that mean nothing here."""
    return [
        key
        for key in extra
        if key not in _REFUSED and key not in _IGNORED and not key.startswith(_REFUSED_PREFIX)
    ]
