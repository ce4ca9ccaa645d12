"""Messages to token ids, with one run of placeholder ids for every picture, as the reference lays them out.

Frames of a video and pages of a document are pictures, too; how many there are is told from outside.

Text of a message is never trusted: if it spells a special token or an image marker, it stays text.
Knows nothing about pixels; how many visual tokens an image takes is told from outside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_service.answer_parser import THINK_START
from llm_service.call_form import CallForm, find_call_form
from llm_service.templates import IMAGE_MARKER, NOTHING, Asks, Call, ChatTemplate, Turn, load_template
from llm_service.tokenizer import Tokenizer, alternation
from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat
from protos.errors import InvalidRequest, ModelError

ROLES = ("system", "user", "assistant", "tool")
# InternVL's examples and the -HF processor have it so; a template ends the line behind each picture.
FRAME_LABEL = "Frame{}: "

# Words of InternVL's grounding language, which users write: `<ref>the cat</ref>`. They steer nothing.
GROUNDING_TOKENS = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))

# Private-use characters around a number stand for hidden text; the first is itself hidden.
_HIDE_START, _HIDE_END = "\ue000", "\ue001"
_HIDDEN = re.compile(f"{_HIDE_START}([0-9]+){_HIDE_END}")


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    """`index` counts the images of the request in the order they appear."""

    index: int


@dataclass(frozen=True)
class VideoPart:
    """Numbered among the images; each frame is a picture behind its label."""

    index: int


@dataclass(frozen=True)
class DocumentPart:
    """Numbered among the images; each page is a picture."""

    index: int


MediaPart = ImagePart | VideoPart | DocumentPart


@dataclass(frozen=True)
class Message:
    role: str
    parts: tuple[TextPart | MediaPart, ...]
    calls: tuple[Call, ...] = ()  # of an assistant


@dataclass(frozen=True)
class PlaceholderRange:
    """Positions [offset, offset + length) of one picture's visual tokens, without `<img>` and `</img>`."""

    offset: int
    length: int


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    placeholders: list[PlaceholderRange]


@dataclass(frozen=True)
class ImageTokens:
    """The strings around and at the positions of visual tokens."""

    start: str = "<img>"
    context: str = "<IMG_CONTEXT>"
    end: str = "</img>"


@dataclass(frozen=True)
class PromptLayout:
    """A prompt before the pictures' sizes are known: one placeholder id where each picture belongs."""

    token_ids: list[int]
    image_offsets: list[int]
    context_id: int
    opens_thinking: bool = False  # what comes is reasoning already

    @property
    def num_text_tokens(self) -> int:
        """Tokens that are no visual tokens, `<img>` and `</img>` included."""
        return len(self.token_ids) - len(self.image_offsets)

    def expand(self, image_tokens: Sequence[int]) -> Prompt:
        """Give picture i its `image_tokens[i]` visual tokens.

        Raises:
            ModelError: the number of placeholders would differ from the number of visual tokens.
        """
        if len(image_tokens) != len(self.image_offsets):
            counts = f"{len(self.image_offsets)} images, {len(image_tokens)} token counts"
            raise ModelError(f"prompt layout: {counts}")
        ids: list[int] = []
        placeholders: list[PlaceholderRange] = []
        end = 0
        for offset, length in zip(self.image_offsets, image_tokens, strict=True):
            ids += self.token_ids[end:offset]
            placeholders.append(PlaceholderRange(len(ids), length))
            ids += [self.context_id] * length
            end = offset + 1
        ids += self.token_ids[end:]
        if ids.count(self.context_id) != sum(image_tokens):
            raise ModelError("prompt layout: placeholder ids outside the images' ranges")
        return Prompt(ids, placeholders)


class PromptBuilder:
    """Lays out prompts for one checkpoint."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        image_tokens: ImageTokens = ImageTokens(),
        extra_stop_token_ids: Iterable[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        for content in (image_tokens.start, image_tokens.context, image_tokens.end):
            if not tokenizer.is_special(tokenizer.token_id(content)):
                raise CheckpointError(f"tokenizer: {content!r} is not marked as special")
        self.context_id = tokenizer.token_id(image_tokens.context)
        self._image_text = image_tokens.start + image_tokens.context + image_tokens.end
        markers = {IMAGE_MARKER, image_tokens.context}
        self._marker = alternation(markers)
        hidden = {*tokenizer.special_tokens, *markers, _HIDE_START} - GROUNDING_TOKENS
        self._hidden = sorted(hidden)
        self._hide_number = {text: number for number, text in enumerate(self._hidden)}
        self._hide_pattern = alternation(hidden)
        stops = [tokenizer.token_id(content) for content in template.stop_tokens]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # An id without a token cannot be sampled, and would be out of range where stops are forbidden.
        extra = [i for i in extra_stop_token_ids if 0 <= i < tokenizer.vocab_size]
        self.default_stop_token_ids = tuple(sorted({*stops, *eos, *extra}))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, tokenizer: Tokenizer) -> PromptBuilder:
        """
        Raises:
            CheckpointError: an unknown template, or a tokenizer without the image or stop tokens.
        """
        names = tokenizer.named_tokens if checkpoint.format is CheckpointFormat.HF else {}
        default = ImageTokens()
        image_tokens = ImageTokens(
            names.get("start_image_token", default.start),
            names.get("context_image_token", default.context),
            names.get("end_image_token", default.end),
        )
        template = load_template(checkpoint, tokenizer.named_tokens, find_call_form(tokenizer.special_tokens))
        return cls(tokenizer, template, image_tokens, _eos_ids(checkpoint))

    @property
    def call_form(self) -> CallForm:
        return self._template.call_form

    def build(
        self,
        messages: Sequence[Message],
        image_tokens: Sequence[int],
        num_parts: Sequence[int] | None = None,
    ) -> Prompt:
        """Token ids of the conversation; picture i takes `image_tokens[i]` visual tokens.

        Raises:
            InvalidRequest: no messages, an unknown role, an image outside a user message.
            ModelError: placeholders and visual tokens do not match in number.
        """
        return self.layout(messages, num_parts).expand(image_tokens)

    def layout(
        self, messages: Sequence[Message], num_parts: Sequence[int] | None = None, asks: Asks = NOTHING
    ) -> PromptLayout:
        """What `build` can say before any picture's size is known; raises as it does.

        Medium i has `num_parts[i]` frames or pages; one each as long as nobody knows.
        """
        counts = num_parts or [1] * _num_media(messages)
        turns = [self._turn(position, message, counts) for position, message in enumerate(messages)]
        if not turns:
            raise InvalidRequest("at least one message is needed", field="messages")
        num_images = sum(counts)
        rendered = self._marker.sub(
            lambda _: self._image_text, self._template.render(turns, self._hidden_asks(asks))
        )
        ids = self._encode(rendered)
        offsets = [offset for offset, token_id in enumerate(ids) if token_id == self.context_id]
        if len(offsets) != num_images:
            raise ModelError(f"chat template: {len(offsets)} image markers for {num_images} images")
        opens_thinking = rendered.rstrip("\n").endswith(THINK_START)
        return PromptLayout(ids, offsets, self.context_id, opens_thinking)

    def _hidden_asks(self, asks: Asks) -> Asks:
        """Nothing that a tool's definition spells is a special token."""
        tools = (json.loads(self._hide(json.dumps(tool, ensure_ascii=False))) for tool in asks.tools)
        return Asks(tuple(tools), asks.thinking)

    def _encode(self, rendered: str) -> list[int]:
        """Ids of the whole string: special tokens where the template put them, nowhere else."""
        pieces = [
            piece if isinstance(piece, int) else self._reveal(piece)
            for piece in self._tokenizer.split_specials(rendered)
        ]
        ids = self._tokenizer.encode(pieces)
        bos_ids = self._tokenizer.bos_ids
        return ids if ids[: len(bos_ids)] == bos_ids else bos_ids + ids

    def _turn(self, position: int, message: Message, counts: Sequence[int]) -> Turn:
        if message.role not in ROLES:
            known = ", ".join(ROLES)
            raise InvalidRequest(f"role must be one of {known}", field=f"messages[{position}].role")
        for number, part in enumerate(message.parts):
            if isinstance(part, MediaPart) and message.role != "user":
                field = f"messages[{position}].parts[{number}]"
                raise InvalidRequest("images are allowed in user messages only", field=field)
        calls = tuple(Call(self._hide(call.name), self._hide(call.arguments)) for call in message.calls)
        return Turn(message.role, tuple(self._content(message.parts, counts)), calls)

    def _content(self, parts: Iterable[TextPart | MediaPart], counts: Sequence[int]) -> Iterator[str | None]:
        """Neighbouring texts become one before hiding: together they may spell a special token."""
        text = ""
        for part in parts:
            if isinstance(part, TextPart):
                text += part.text
                continue
            for number in range(1, counts[part.index] + 1):
                text += FRAME_LABEL.format(number) if isinstance(part, VideoPart) else ""
                if text:
                    yield self._hide(text)
                yield None
                text = ""
        if text:
            yield self._hide(text)

    def _hide(self, text: str) -> str:
        return self._hide_pattern.sub(
            lambda match: f"{_HIDE_START}{self._hide_number[match.group()]}{_HIDE_END}", text
        )

    def _reveal(self, text: str) -> str:
        return _HIDDEN.sub(lambda match: self._hidden[int(match.group(1))], text)


def _num_media(messages: Iterable[Message]) -> int:
    parts = [part for message in messages for part in message.parts]
    indexes = [part.index for part in parts if isinstance(part, MediaPart)]
    if indexes != list(range(len(indexes))):
        raise ModelError(f"media are not numbered in the order they appear: {indexes}")
    return len(indexes)


def _eos_ids(checkpoint: Checkpoint) -> set[int]:
    """`eos_token_id` of every config that has one; InternVL3's is not the token that ends a turn."""
    config = checkpoint.config
    sources: list[Mapping[str, Any] | None] = [
        config,
        config.get("llm_config"),
        config.get("text_config"),
        checkpoint.read_json("generation_config.json"),
    ]
    ids: set[int] = set()
    for source in sources:
        eos = (source or {}).get("eos_token_id")
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return ids
