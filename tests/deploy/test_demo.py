"""`make demo` for real: it answers rightly, measures and ends; it fails when a service does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from deploy.demo import PICTURE, QUESTIONS, Answer, table
from tests.deploy.shown_answers import SHOWN_ANSWERS

DEMO = [sys.executable, "-m", "deploy.demo", "--kv-cache-gib", "0.1"]


def test_the_picture_is_a_small_jpeg() -> None:
    with Image.open(PICTURE) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("JPEG", (960, 640))
    assert PICTURE.stat().st_size < 60_000


def test_it_answers_rightly_about_the_picture_and_says_what_it_took() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(DEMO, capture_output=True, text=True, timeout=180, env=environment)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    shown = "".join(f"question  {q}\nanswer    {a}\n" for q, a in zip(QUESTIONS, SHOWN_ANSWERS, strict=True))
    assert f"\npicture   deploy/pictures/{PICTURE.name}\n{shown}" in finished.stdout
    rows = {name: [int(number) for number in numbers.split()] for name, numbers in map(cut, lines[-7:])}
    # 3 x 2 tiles and a thumbnail, 64 visual tokens each; only the first question computes them.
    assert rows["visual"] == [448] * len(QUESTIONS)
    assert rows["cached"][0] == 0 and min(rows["cached"][1:]) > 448
    assert all(
        first <= whole for first, whole in zip(rows["first token, ms"], rows["whole answer, ms"], strict=True)
    )
    assert max(rows["answer tokens"]) < 64  # it has ended its answers itself


def cut(line: str) -> tuple[str, str]:
    return line[:18].strip(), line[18:]


def test_a_part_that_does_not_start_fails_the_demo(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["InternVLChatModel"]}')
    finished = subprocess.run([*DEMO, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert finished.returncode == 1 and not finished.stdout
    assert re.search(r"demo failed: (encoder|llm) ended \(exit code 1\)", finished.stderr)


def test_the_table_has_a_column_for_each_answer() -> None:
    details = {"image_tokens": 4, "cached_tokens": 0}
    first = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": details}
    second = {"prompt_tokens": 15, "completion_tokens": 2}  # servers may leave details out
    answers = [Answer("a", 0.5, 0.75, first), Answer("b", 0.0625, 0.125, second)]
    assert [line.split() for line in table(answers)] == [
        ["question", "1", "2"],
        ["first", "token,", "ms", "500", "62"],
        ["whole", "answer,", "ms", "750", "125"],
        ["prompt", "tokens", "9", "15"],
        ["visual", "4", "0"],
        ["cached", "0", "0"],
        ["answer", "tokens", "3", "2"],
    ]
