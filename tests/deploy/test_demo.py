"""`make demo` for real: it answers, measures and ends; it fails when a service does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from deploy.demo import PICTURE, Measurement

DEMO = [sys.executable, "-m", "deploy.demo", "--kv-cache-gib", "0.1"]


def test_the_picture_is_a_small_jpeg() -> None:
    with Image.open(PICTURE) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("JPEG", (960, 640))
    assert PICTURE.stat().st_size < 60_000


def test_it_answers_about_the_picture_and_says_how_fast() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(DEMO, capture_output=True, text=True, timeout=180, env=environment)
    assert finished.returncode == 0, finished.stderr
    for expected in (
        r"^answer    .{40}",
        r"^time to first token  \d+ ms$",
        r"^decoding             \d+ tokens/s$",
        # 3 x 2 tiles and a thumbnail, 64 visual tokens each
        r"^prompt               \d+ tokens, 448 of them visual$",
        r"^answer               64 tokens$",
        r"answers are noise until the demo model arrives$",
    ):
        assert re.search(expected, finished.stdout, re.MULTILINE), (expected, finished.stdout)


def test_a_part_that_does_not_start_fails_the_demo(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["InternVLChatModel"]}')
    finished = subprocess.run([*DEMO, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert finished.returncode == 1 and not finished.stdout
    assert re.search(r"demo failed: (encoder|llm) ended \(exit code 1\)", finished.stderr)


def test_speed_counts_the_tokens_after_the_first() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 11,
        "prompt_tokens_details": {"image_tokens": 4, "cached_tokens": 0},
    }
    measurement = Measurement(first_token_s=0.5, total_s=2.5, usage=usage)
    assert measurement.lines() == [
        "time to first token  500 ms",
        "decoding             5 tokens/s",
        "prompt               9 tokens, 4 of them visual",
        "answer               11 tokens",
    ]
