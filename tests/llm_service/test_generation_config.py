"""What generation_config.json says about sampling, and what it must not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_service.generation_config import read_generation_config
from llm_service.sampling_params import SamplingParams
from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat


def read(folder: Path, text: str | None) -> SamplingParams:
    if text is not None:
        (folder / "generation_config.json").write_text(text)
    return read_generation_config(Checkpoint(folder, {}, CheckpointFormat.CHAT, {}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, SamplingParams()),
        ('{"eos_token_id": 2}', SamplingParams()),
        ('{"do_sample": true}', SamplingParams()),
        ('{"do_sample": null, "temperature": null, "top_k": null}', SamplingParams()),
        ('{"do_sample": false}', SamplingParams(temperature=0.0)),
        ('{"do_sample": false, "temperature": 0.6}', SamplingParams(temperature=0.6)),
        ('{"do_sample": false, "top_p": 0.9}', SamplingParams(temperature=0.0, top_p=0.9)),
        ('{"do_sample": true, "temperature": 0}', SamplingParams(temperature=0.0)),
        ('{"top_k": -1, "max_new_tokens": 1}', SamplingParams(top_k=-1, max_tokens=1)),
        ('{"max_length": 20, "min_tokens": 4, "n": 3}', SamplingParams()),
    ],
)
def test_what_a_file_means(tmp_path: Path, text: str | None, expected: SamplingParams) -> None:
    assert read(tmp_path, text) == expected


def test_every_parameter_is_read(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
    }
    expected = SamplingParams(**values, max_tokens=2048)
    assert read(tmp_path, json.dumps({**values, "max_new_tokens": 2048, "do_sample": True})) == expected


def test_a_whole_number_becomes_a_float(tmp_path: Path) -> None:
    assert isinstance(read(tmp_path, '{"temperature": 1}').temperature, float)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("temperature", "-0.1", r": must be in \[0, 2\], got -0.1"),
        ("temperature", "2.5", r": must be in \[0, 2\], got 2.5"),
        ("temperature", "NaN", r": must be in \[0, 2\], got nan"),
        ("temperature", '"hot"', " must be a number, got 'hot'"),
        ("temperature", "true", " must be a number, got True"),
        ("top_p", "0", r": must be in \(0, 1\], got 0"),
        ("top_p", "1.01", r": must be in \(0, 1\], got 1.01"),
        ("top_k", "-2", ": must be at least 1, or 0 or -1 for off, got -2"),
        ("top_k", "2.5", " must be a 32-bit integer, got 2.5"),
        ("top_k", "2147483648", " must be a 32-bit integer, got 2147483648"),
        ("min_p", "1.5", r": must be in \[0, 1\], got 1.5"),
        ("repetition_penalty", "0", r": must be in \(0, 2\], got 0"),
        ("repetition_penalty", "[1]", r" must be a number, got \[1\]"),
        ("max_new_tokens", "0", ": must be at least 1, got 0"),
        ("max_new_tokens", "false", " must be a 32-bit integer, got False"),
        ("do_sample", "0", " must be true or false, got 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_file_and_key(
    tmp_path: Path, key: str, value: str, problem: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/generation_config\.json: {key}{problem}"):
        read(tmp_path, f'{{"{key}": {value}}}')
