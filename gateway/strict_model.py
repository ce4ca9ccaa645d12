"""What all request bodies and their parts have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    # Strict: "16" is not a number and 1 is not a bool.  NaN would not survive as JSON.
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)
