"""One folder of each kind of tokenizer; tests that change a file write their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llm_service.vocabularies import write_byte_level, write_sentencepiece


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session", params=[True, False], ids=["dummy_prefix", "no_dummy_prefix"])
def internlm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("internlm2"), request.param)
