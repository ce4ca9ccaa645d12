"""Samples are laid out as the services lay out requests, and answers are found where they are."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from deploy.demo_training.conversation import Encoder, Style
from deploy.demo_training.model import NO_MARK
from deploy.demo_training.sample import MARK_LABELS, Mark, Picture, Sample, Turn
from llm_service.tokenizer import Tokenizer

TURNS = (Turn("color", "What color is it?", "red"), Turn("count", "How many?", "3"))


def picture(width: int, height: int, *marks: Mark) -> Picture:
    return Picture(Image.new("RGB", (width, height), "navy"), marks)


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The prompt's text with runs of visual tokens as one."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    while "<IMG_CONTEXT><IMG_CONTEXT>" in text:
        text = text.replace("<IMG_CONTEXT><IMG_CONTEXT>", "<IMG_CONTEXT>")
    return text


def test_a_conversation_reads_as_served(encoder: Encoder, tokenizer: Tokenizer) -> None:
    encoded = encoder.encode(Sample(TURNS, (picture(200, 200),)), Style())
    assert shown(tokenizer, encoded.ids) == (
        "<|im_start|>system\nYou are the demo model of Tessera.<|im_end|>\n"
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat color is it?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n3<|im_end|>"
    )
    answers = [tokenizer.decode(encoded.ids[answer.start : answer.end], False) for answer in encoded.answers]
    assert answers == ["red<|im_end|>", "3<|im_end|>"]
    assert [answer.turn for answer in encoded.answers] == list(TURNS)


def test_labels_stand_before_their_pictures_and_a_question_may_come_first(
    encoder: Encoder, tokenizer: Tokenizer
) -> None:
    pictures = (picture(200, 200), picture(200, 200))
    sample = Sample(TURNS[:1], pictures, labels=("Image-1: ", "Image-2: "))
    text = shown(tokenizer, encoder.encode(sample, Style(system="Be brief.", question_first=True)).ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    pictures_shown = "Image-1: <img><IMG_CONTEXT></img>\nImage-2: <img><IMG_CONTEXT></img>\n"
    assert f"user\nWhat color is it?\n{pictures_shown}<|im_end|>" in text


@pytest.mark.parametrize(
    ("size", "max_tiles", "num_tiles"),
    [
        ((300, 300), None, 1),
        ((400, 400), None, 5),
        ((960, 640), None, 7),
        ((960, 640), 1, 1),
        ((500, 250), None, 3),
    ],
)
def test_tiles_and_placeholders_follow_the_size(
    encoder: Encoder, size: tuple[int, int], max_tiles: int | None, num_tiles: int
) -> None:
    encoded = encoder.encode(Sample(TURNS, (picture(*size),), max_tiles=max_tiles), Style())
    assert encoded.tiles.shape == (num_tiles, 3, 224, 224)
    assert encoded.ids.count(encoder.context_id) == 64 * num_tiles
    assert encoded.marks.shape == (num_tiles, 256)


def test_a_mark_is_found_in_its_tile_and_in_the_thumbnail(encoder: Encoder) -> None:
    mark = Mark("A", x=0.9, y=0.6)  # of a 3 x 2 grid: the last tile of the second row
    marks = encoder.encode(Sample(TURNS, (picture(960, 640, mark),)), Style()).marks
    found = (marks != NO_MARK).nonzero().tolist()
    # In the grid of 48 x 32 patches it is column 43, row 19; in the thumbnail of 16 x 16 column 14, row 9.
    assert found == [[5, (19 - 16) * 16 + 43 - 32], [6, 9 * 16 + 14]]
    assert {MARK_LABELS[int(marks[tile, patch])] for tile, patch in found} == {"A"}


def test_marks_outside_the_picture_are_left_out(encoder: Encoder) -> None:
    encoded = encoder.encode(
        Sample(TURNS, (picture(200, 200, Mark("A", 1.0, 0.5), Mark("B", 0.5, -0.1)),)), Style()
    )
    assert (encoded.marks == NO_MARK).all()


def test_talk_has_no_tiles(encoder: Encoder) -> None:
    encoded = encoder.encode(Sample((Turn("talk", "Hello", "Hi"),)), Style())
    assert len(encoded.tiles) == 0 and encoder.context_id not in encoded.ids
    assert torch.equal(encoded.tiles, torch.empty((0, 0, 0, 0), dtype=torch.uint8))
