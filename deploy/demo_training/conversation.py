"""A sample as the model sees it: tiles cut and prompt laid out by the very code that serves requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deploy.demo_training.model import NO_MARK
from deploy.demo_training.sample import MARK_LABELS, Mark, Picture, Sample, Turn
from deploy.random_checkpoint import PATCH
from encoder_service.tiling import TileCutter, TilePlan, TilingOptions, plan_tiles
from llm_service.prompt import ImagePart, Message, PromptBuilder, TextPart
from llm_service.tokenizer import Tokenizer
from protos.preprocessing import Preprocessing

_LABEL_IDS = {label: index for index, label in enumerate(MARK_LABELS)}


@dataclass(frozen=True)
class Answer:
    """Positions [start, end) of one answer's tokens, the token that ends it included."""

    turn: Turn
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    tiles: torch.Tensor  # [num_tiles, 3, S, S] uint8
    marks: torch.Tensor  # [num_tiles, num_patches] uint8, index into MARK_LABELS or NO_MARK
    ids: list[int]
    answers: list[Answer]


@dataclass(frozen=True)
class Style:
    """What a client may do differently with the same questions."""

    system: str | None = None
    question_first: bool = False


class Encoder:
    def __init__(self, preprocessing: Preprocessing, tokenizer: Tokenizer, builder: PromptBuilder) -> None:
        self.preprocessing = preprocessing
        self.context_id = builder.context_id
        self._builder = builder
        self._end = tokenizer.token_id("<|im_end|>")
        self._opening = [
            tokenizer.token_id("<|im_start|>"),
            *tokenizer.encode_plain("assistant\n", at_start=False),
        ]

    def plan(self, size: tuple[int, int], max_tiles: int | None) -> TilePlan:
        settings = self.preprocessing
        options = TilingOptions(settings.min_tiles, max_tiles or settings.max_tiles, settings.use_thumbnail)
        return plan_tiles(*size, options, settings.image_size)

    def encode(self, sample: Sample, style: Style) -> Encoded:
        plans = [self.plan(picture.image.size, sample.max_tiles) for picture in sample.pictures]
        tokens = self.preprocessing.tokens_per_tile
        prompt = self._builder.build(messages(sample, style), [plan.num_tiles * tokens for plan in plans])
        answers = list(self._answers(prompt.token_ids, sample.turns))
        pairs = list(zip(sample.pictures, plans, strict=True))
        return Encoded(
            tiles=self._stack([self._cut(picture, plan) for picture, plan in pairs], 3),
            marks=self._stack([self._mark_map(picture.marks, plan) for picture, plan in pairs], 1),
            ids=prompt.token_ids[: answers[-1].end],
            answers=answers,
        )

    def _cut(self, picture: Picture, plan: TilePlan) -> torch.Tensor:
        return TileCutter(picture.image, plan, self.preprocessing.image_size).cut(range(plan.num_tiles))

    def _stack(self, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
        return torch.cat(parts) if parts else torch.empty((0, *(0,) * rank), dtype=torch.uint8)

    def _mark_map(self, marks: tuple[Mark, ...], plan: TilePlan) -> torch.Tensor:
        side = self.preprocessing.image_size // PATCH
        found = torch.full((plan.num_tiles, side * side), NO_MARK, dtype=torch.uint8)
        for mark in marks:
            if not (0 <= mark.x < 1 and 0 <= mark.y < 1):
                continue
            column, row = int(mark.x * plan.columns * side), int(mark.y * plan.rows * side)
            tile = row // side * plan.columns + column // side
            found[tile, row % side * side + column % side] = _LABEL_IDS[mark.label]
            if plan.has_thumbnail:
                found[-1, int(mark.y * side) * side + int(mark.x * side)] = _LABEL_IDS[mark.label]
        return found

    def _answers(self, ids: list[int], turns: tuple[Turn, ...]) -> Iterator[Answer]:
        """An answer starts behind every `<|im_start|>assistant\\n`, which no text can spell."""
        width, end = len(self._opening), 0
        for turn in turns:
            start = next(at for at in range(end, len(ids)) if ids[at : at + width] == self._opening) + width
            end = ids.index(self._end, start) + 1
            yield Answer(turn, start, end)


def messages(sample: Sample, style: Style) -> list[Message]:
    """The whole conversation in the order of an OpenAI request."""
    first = [ImagePart(index) for index in range(len(sample.pictures))]
    parts: list[TextPart | ImagePart] = []
    for index, image in enumerate(first):
        parts += [TextPart(sample.labels[index]), image] if sample.labels else [image]
    question = sample.turns[0].question
    if style.question_first:  # the gateway puts a line break between texts that follow each other
        parts = [TextPart(f"{question}\n" if sample.labels else question), *parts]
    else:
        parts.append(TextPart(question))
    conversation = [Message("user", tuple(parts))]
    for before, turn in zip(sample.turns, sample.turns[1:], strict=False):
        conversation.append(Message("assistant", (TextPart(before.answer),)))
        conversation.append(Message("user", (TextPart(turn.question),)))
    conversation.append(Message("assistant", (TextPart(sample.turns[-1].answer),)))
    if style.system is not None:
        conversation.insert(0, Message("system", (TextPart(style.system),)))
    return conversation
