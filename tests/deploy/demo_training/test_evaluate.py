"""The evaluation asks a real gateway; behind it a scripted model knows the answers, or some of them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from deploy.demo_training.evaluate import main
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.held_out import Question, held_out_questions
from protos import language_model_pb2 as pb
from tests.gateway.scripted import (
    Gateway,
    Script,
    default_info,
    delta,
    finished,
    gateway_before,
    started,
    usage,
)

NUM_QUESTIONS = 24
FIRST_ANSWER = "what the model said first"
INFO = default_info(max_images=64, max_request_bytes=32 << 20)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return held_out_questions(FontShelf.find("held_out"), 7, NUM_QUESTIONS)


def knows(questions: Sequence[Question], wrong: Sequence[str] = ()) -> Script:
    """Right by the pictures and the last text of a request; "no idea" in the rows of `wrong`."""
    answers = {(pictures_of(question), question.texts[-1]): question for question in questions}

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        parts = [part for message in request.messages for part in message.parts]
        pictures = tuple(part.image.data for part in parts if part.HasField("image"))
        question = answers.get((pictures, parts[-1].text))
        text = FIRST_ANSWER if question is None else "no idea" if question.row in wrong else question.answer
        for event in (started(), delta(text[:2]), delta(f"{text[2:]}\n"), finished(), usage()):
            yield event

    return script


def pictures_of(question: Question) -> tuple[bytes, ...]:
    return tuple(picture.data for picture in question.pictures)


async def evaluate(gateway: Gateway, *arguments: str) -> int:
    url = f"http://127.0.0.1:{gateway.port}/v1"
    argv = ["--base-url", url, "--seed", "7", "--questions", str(NUM_QUESTIONS), *arguments]
    return await asyncio.to_thread(main, argv)


async def test_right_answers_meet_every_requirement(
    questions: list[Question], capsys: pytest.CaptureFixture[str]
) -> None:
    async with gateway_before(knows(questions), INFO) as gateway:
        assert await evaluate(gateway) == 0
    out = capsys.readouterr().out
    assert f"| all | {len(questions)} | {len(questions)} | 100.0 % |  |" in out
    assert "model org/tiny-vl" in out and "Pillow" in out and "wrong" not in out
    assert re.search(r"^\d+\.\d\d s per question \(median, 4 at once\)$", out, re.MULTILINE)


async def test_a_required_row_that_falls_short_is_told_and_fails(
    questions: list[Question], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, folder = tmp_path / "table.json", tmp_path / "wrong"
    async with gateway_before(knows(questions, wrong=["motion", "talk"]), INFO) as gateway:
        assert await evaluate(gateway, "--json", str(file), "--save", str(folder), "--concurrency", "1") == 1
    out = capsys.readouterr().out
    wrong = [question for question in questions if question.row in ("motion", "talk")]
    clips = [question for question in wrong if question.row == "motion"]
    assert f"| motion | {len(clips)} | 0 | 0.0 % | ≥ 90 % |" in out
    assert out.endswith("motion: 0.0 % is less than 90 %\n")
    assert f"wrong ({len(wrong)} of {len(wrong)})" in out
    assert f"- motion: {clips[0].texts[0]} — expected {clips[0].answer!r}, got 'no idea" in out
    told = json.loads(file.read_text())
    assert (told["model"], told["seed"], len(told["wrong"])) == ("org/tiny-vl", 7, len(wrong))
    page = (folder / "index.html").read_text()
    saved = sorted(path.name for path in folder.glob("*.png"))
    assert saved == sorted(re.findall(r'src="(.+?)"', page))
    assert len(saved) == sum(len(question.pictures) for question in wrong)
    with Image.open(folder / saved[0]) as picture:
        assert picture.format == "PNG"


async def test_a_row_that_nothing_is_required_of_may_be_wrong(questions: list[Question]) -> None:
    async with gateway_before(knows(questions, wrong=["talk", "yes/no", "second turn"]), INFO) as gateway:
        assert await evaluate(gateway) == 0


async def test_requests_are_greedy_and_carry_labels_tiles_and_the_models_own_first_answer(
    questions: list[Question],
) -> None:
    async with gateway_before(knows(questions), INFO) as gateway:
        await evaluate(gateway)
        requests = {asked(request): request for request in gateway.llm.requests}
    for question in questions:
        request = requests[pictures_of(question), question.texts]
        assert (request.sampling.temperature, request.sampling.max_tokens) == (0, 48)
        first = request.messages[0].parts
        images = [part.image for part in first if part.HasField("image")]
        assert [image.tiling.max_tiles for image in images] == [question.max_tiles or 0] * len(images)
        texts = [part.text for part in first if not part.HasField("image")]
        assert texts == [*question.labels, question.texts[0]]
        roles = [message.role for message in request.messages]
        assert roles == ["user", "assistant", "user"][: 2 * len(question.texts) - 1]
        if len(roles) > 1:
            assert request.messages[1].parts[0].text.strip() == FIRST_ANSWER


def asked(request: pb.GenerateRequest) -> tuple[tuple[bytes, ...], tuple[str, ...]]:
    """Pictures and the user's texts without the labels."""
    parts = [part for message in request.messages for part in message.parts]
    pictures = tuple(part.image.data for part in parts if part.HasField("image"))
    return pictures, tuple(message.parts[-1].text for message in request.messages if message.role == "user")


async def test_a_failing_service_is_no_wrong_answer(
    questions: list[Question], capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        raise RuntimeError("broken")

    async with gateway_before(script, INFO) as gateway:
        assert await evaluate(gateway) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "evaluation failed: " in captured.err


@pytest.mark.parametrize(
    "arguments", [["--questions", "0"], ["--fonts", "no/such/folder"], ["--concurrency", "x"]]
)
def test_wrong_arguments_are_refused_at_once(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err
