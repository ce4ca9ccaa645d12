"""Raw body to checked request; what is wrong with it is said in plain English with the path of the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from gateway.completions_schema import CompletionRequest
from gateway.errors import THREAD_UNSUPPORTED, RequestError
from gateway.format_schema import FormatFields
from gateway.schema import MAX_CHOICES, ChatCompletionRequest, StreamOptions, refused_key
from gateway.strict_model import StrictModel
from gateway.tool_schema import ToolFields

Model = TypeVar("Model", bound=StrictModel)

_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}
# Validators of schema.py word these themselves.
_OWN = {
    "content_type",
    "prompt_type",
    "stop",
    "logit_bias",
    "cache_salt",
    "tiles",
    "schema_type",
    "formats",
    "json_size",
}
# Small objects and arrays take a hundred times as long to read and check as the bytes of a picture.  Bodies
# below the threshold are not worth counting.
COUNT_ABOVE_BYTES = 2 << 20
MAX_CONTAINERS = 1 << 16
# What is neither takes longer to count, and less to read.
COUNT_ALL_ABOVE_BYTES = 16 << 20
MAX_ELEMENTS = 4 << 20
# Errors whose kind is the code that clients know.
_CODES = {"previous_response_not_found", THREAD_UNSUPPORTED}
# A part is refused for its type, which is one step below the place where the union failed.
_BELOW = {"unsupported_content_part": "type", "unsupported_response_format": "type"}
# What has taken the place of a key that is refused.
_SUCCESSORS = {"functions": "tools", "function_call": "tool_choice"}


def parse_request(body: bytes, model: type[Model]) -> Model:
    """Check `body` against `model`, cross-field rules and unsupported keys included.

    Raises:
        RequestError: names the first field at fault.
    """
    try:
        parsed = model.model_validate(_json(body))
    except ValidationError as error:
        raise fault_of(error) from None
    check_together(parsed)
    return parsed


def fault_of(error: ValidationError) -> RequestError:
    """The first of the faults that pydantic found, in words of ours."""
    return _request_error(error.errors(include_url=False, include_input=False)[0])


def check_together(request: StrictModel) -> None:
    """What no field can know by itself: unsupported keys, and fields that need others.

    Raises:
        RequestError: names the first field at fault.
    """
    refused = refused_key(request.model_extra or {})
    if refused is not None:
        message = f"'{refused}' is not supported by this server with this value."
        if refused in _SUCCESSORS:
            message += f" Use '{_SUCCESSORS[refused]}'."
        raise RequestError(message, code="unsupported_parameter", param=refused)
    if isinstance(request, ChatCompletionRequest):
        if request.top_logprobs and not request.logprobs:
            raise _invalid("top_logprobs", "needs 'logprobs' to be true")
        _check_stream_options(request.stream_options, request.stream)
        _check_tools(request)
    if isinstance(request, FormatFields):
        _check_formats(request)
    if isinstance(request, CompletionRequest):
        _check_completion(request)
        _check_stream_options(request.stream_options, request.stream)


def _check_stream_options(options: StreamOptions | None, stream: bool | None) -> None:
    if options is not None and not stream and (options.include_usage or options.continuous_usage_stats):
        raise _invalid("stream_options", "needs 'stream' to be true")


def _check_tools(tools: ToolFields) -> None:
    if not tools.tools and tools.tool_choice not in (None, "none", "auto"):
        raise _invalid("tool_choice", "needs 'tools'")


def _check_formats(request: FormatFields) -> None:
    formats = request.formats
    if len(formats) > 1:
        raise _invalid(formats[1].param, f"cannot be combined with '{formats[0].param}'")


def _check_completion(completion: CompletionRequest) -> None:
    if completion.num_choices > MAX_CHOICES:
        raise _invalid("prompt", f"prompts times 'n' must be at most {MAX_CHOICES}")
    if completion.echo and completion.logprobs is not None:
        message = "'echo' together with 'logprobs' is not supported: prompts have no log-probabilities here."
        raise RequestError(message, code="unsupported_parameter", param="echo")


def _invalid(param: str, text: str, code: str = "invalid_value") -> RequestError:
    return RequestError(f"Invalid value for '{param}': {text}.", code=code, param=param)


def _json(body: bytes) -> Any:
    """Apart from the checks: pydantic would copy what it hands to each discriminator, pictures included."""
    _check_density(body)
    try:
        return from_json(body)
    except ValueError as error:
        raise RequestError(_json_message(str(error)), code="invalid_json") from None


def _check_density(body: bytes) -> None:
    """Raises RequestError; marks within strings count, too."""
    if len(body) <= COUNT_ABOVE_BYTES:
        return
    has_too_many = any(_has_more(body, mark, MAX_CONTAINERS) for mark in (b"{", b"["))
    if has_too_many or (len(body) > COUNT_ALL_ABOVE_BYTES and body.count(b",") > MAX_ELEMENTS):
        message = "The request body has too many elements."
        raise RequestError(message, code="request_too_large", status=413)


def _has_more(body: bytes, mark: bytes, most: int) -> bool:
    """By `find`, which passes over a picture ten times as fast as `count`."""
    at = -1
    for _ in range(most + 1):
        at = body.find(mark, at + 1)
        if at < 0:
            return False
    return True


def _request_error(error: ErrorDetails) -> RequestError:
    kind, context = error["type"], error.get("ctx", {})
    param = _path(error["loc"])
    if kind in _BELOW:
        param = f"{param}.{_BELOW[kind]}"
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
        return RequestError(message, code="missing_required_parameter", param=param)
    if kind == "one_of":
        return RequestError(error["msg"])
    if not param:
        return RequestError("The request body must be a JSON object.", code="invalid_type")
    if kind in _TYPES:
        return _invalid(param, f"must be {_TYPES[kind]}", "invalid_type")
    if kind.startswith("unsupported_") or kind in _CODES:
        return _invalid(param, error["msg"], kind)
    return _invalid(param, error["msg"] if kind in _OWN else _rule(kind, context))


def _path(location: Sequence[int | str]) -> str:
    """`messages.0.content.1.text`; the '#' tags of schema.py are no part of the body."""
    return ".".join(str(step)[:64] for step in location if not str(step).startswith(("#", "[")))


def _json_message(library_text: str) -> str:
    place = re.search(r"line \d+ column \d+", library_text)
    where = f" ({place.group()})" if place else ""
    return f"The request body is not valid JSON{where}."


def _rule(kind: str, context: dict[str, Any]) -> str:
    """The violated bound in words."""
    bounds = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    for key, words in bounds.items():
        if key in context:
            bound = context[key]
            return f"must be {words} {bound:g}" if isinstance(bound, float) else f"must be {words} {bound}"
    if kind == "literal_error":
        return _literals(context["expected"])
    if kind.endswith("too_short"):
        return "must not be empty"
    if kind.endswith("too_long"):
        return f"must have at most {context['max_length']} {'characters' if 'string' in kind else 'entries'}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    if kind == "extra_forbidden":
        return "is not supported by this server"
    if kind == "finite_number":
        return "must be a finite number"
    return "is not valid"


def _literals(expected: str) -> str:
    """`expected` as pydantic joins Python's literals; the only booleans stand alone."""
    if " or " in expected:
        return f"must be one of {expected}"
    return f"must be {expected.lower() if expected in ('True', 'False') else expected}"
