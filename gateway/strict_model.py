"""What all request bodies and their parts have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema


def text_or_list(value: Any) -> str | None:
    """Discriminates what may be given as a string or as an array."""
    return "#string" if isinstance(value, str) else "#list" if isinstance(value, list) else None


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for key, value in schema.items():
            if key != "metadata":
                _fail_fast(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            _fail_fast(value)


class StrictModel(BaseModel):
    # Strict: "16" is not a number and 1 is not a bool.  NaN would not survive as JSON.
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lists end at their first fault, the only one that is told: a body can have millions."""
        schema = handler(source)
        _fail_fast(schema)
        return schema
