"""What a language-model service says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """Zero means that the service did not state the limit."""

    id: str
    max_model_len: int  # prompt plus completion, tokens
    max_images: int  # of one request
    max_media_bytes: int  # of one request
    max_tiles: int  # of one picture
    encoders_ready: int
    max_upload_bytes: int = 0  # of one medium that goes apart from its request
