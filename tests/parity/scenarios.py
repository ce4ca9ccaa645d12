"""The conversations that every model answers in every mode, and their spelling for each interface."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from PIL import Image

from llm_service.prompt import ImagePart, Message, TextPart
from protos import encoder_pb2
from protos import language_model_pb2 as pb


@dataclass(frozen=True)
class Picture:
    """A lossless file; `max_tiles` None means the checkpoint's default."""

    png: bytes
    max_tiles: int | None = None

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png)).convert("RGB")


@dataclass(frozen=True)
class Turn:
    role: str
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True)
class Scenario:
    name: str
    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Picture)]

    def messages(self) -> list[Message]:
        """As PromptBuilder takes them."""
        indexes = count()
        return [
            Message(
                turn.role,
                tuple(
                    TextPart(part) if isinstance(part, str) else ImagePart(next(indexes))
                    for part in turn.parts
                ),
            )
            for turn in self.turns
        ]

    def conversation(self) -> list[dict[str, Any]]:
        """As transformers' chat templates take it."""

        def content(part: str | Picture) -> dict[str, Any]:
            return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}

        return [{"role": turn.role, "content": [content(part) for part in turn.parts]} for turn in self.turns]

    def request(self, max_tokens: int, **sampling: Any) -> pb.GenerateRequest:
        """As LanguageModel.Generate takes it: greedy and of a fixed length."""
        return pb.GenerateRequest(
            messages=[
                pb.Message(role=turn.role, parts=[_proto_part(part) for part in turn.parts])
                for turn in self.turns
            ],
            sampling=pb.SamplingParams(
                max_tokens=max_tokens, temperature=0, ignore_eos=True, skip_special_tokens=False, **sampling
            ),
        )

    def openai_messages(self) -> list[dict[str, Any]]:
        return [
            {"role": turn.role, "content": [_openai_part(part) for part in turn.parts]} for turn in self.turns
        ]


def _proto_part(part: str | Picture) -> pb.Part:
    if isinstance(part, str):
        return pb.Part(text=part)
    tiling = encoder_pb2.TilingOptions()
    if part.max_tiles is not None:
        tiling.max_tiles = part.max_tiles
    return pb.Part(image=pb.Image(data=part.png, tiling=tiling))


def _openai_part(part: str | Picture) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    image_url: dict[str, Any] = {"url": "data:image/png;base64," + base64.b64encode(part.png).decode()}
    if part.max_tiles is not None:
        image_url["max_dynamic_patch"] = part.max_tiles
    return {"type": "image_url", "image_url": image_url}


def picture(width: int, height: int, seed: int, max_tiles: int | None = None) -> Picture:
    """Coloured clouds: unlike noise, they still differ from each other when they are scaled down."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return Picture(file.getvalue(), max_tiles)


def _clip() -> Iterator[str | Picture]:
    for frame in range(8):
        yield f"Frame{frame + 1}: "
        yield picture(80, 60, seed=100 + frame, max_tiles=1)
    yield "What happens?"


MANY_TILES = Scenario(
    "many_tiles", (Turn("user", ("Look at this picture of a house: ", picture(200, 150, 2), "Describe it.")),)
)
ONE_TILE = Scenario("one_tile", (Turn("user", (picture(50, 45, 1), "What is in the picture?")),))
TEXT_ONLY = Scenario(
    "text_only", (Turn("user", ("Tell me about the small red house near the lake, please.",)),)
)
SCENARIOS = (
    TEXT_ONLY,
    ONE_TILE,
    MANY_TILES,
    Scenario(
        "two_interleaved",
        (
            Turn(
                "user",
                ("Compare ", picture(120, 60, 3), " with ", picture(70, 160, 4), "and say which is red."),
            ),
        ),
    ),
    Scenario(
        "multi_turn",
        (
            Turn("user", (picture(130, 90, 5), "What is this?")),
            Turn("assistant", ("A house near the lake, 一张图片.",)),
            Turn("user", ("And this? ", picture(90, 170, 6), "Be naïve 🙂")),
        ),
    ),
    Scenario("clip", (Turn("user", tuple(_clip())),)),
)
