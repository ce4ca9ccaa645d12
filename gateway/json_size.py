"""A bound on JSON that is written out again, checked before anything walks over all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

# No less than what the language model allows of schemas, and of tools with all that is around them.
MAX_JSON_BYTES = 512 << 10


def is_larger(value: Any, limit: int) -> bool:
    """Whether a value certainly takes more than `limit` bytes as JSON; what is nearly as large may pass."""
    size, left = 0, [iter((value,))]
    while left and size <= limit:
        for each in left[-1]:
            size += 1
            if isinstance(each, str):
                size += len(each)
            elif isinstance(each, int):
                size += each.bit_length() // 4
            elif isinstance(each, dict | list):
                left.append(iter(_inside(each)))
                break
            if size > limit:
                break
        else:
            left.pop()
    return size > limit


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    if isinstance(value, list):
        return value
    return (each for item in value.items() for each in item)


def _bounded(value: Any) -> Any:
    if is_larger(value, MAX_JSON_BYTES):
        raise PydanticCustomError("json_size", f"must have at most {MAX_JSON_BYTES} bytes")
    return value


# In an Annotated: whatever the value is, it is not large.
BOUNDED = BeforeValidator(_bounded)
