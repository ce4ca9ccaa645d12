"""The key of the commands that call a gateway, up to a gateway that asks for one."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import pytest

from deploy import cli
from deploy.api_key import API_KEY_VARIABLE, add_key_arguments, api_key_of
from deploy.cli import UsageError
from tests.gateway.scripted import gateway_before, says
from tests.gateway.test_access import KEY, with_keys

IN_ENVIRONMENT = {API_KEY_VARIABLE: "sk-environment"}


def key_of(*words: str, **environment: str) -> str:
    parser = argparse.ArgumentParser()
    add_key_arguments(parser)
    return api_key_of(parser.parse_args(words), environment)


def test_what_is_said_wins_over_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sk-file\n")
    assert key_of() == ""
    assert key_of(**IN_ENVIRONMENT) == "sk-environment"
    assert key_of("--api-key", "sk-flag", **IN_ENVIRONMENT) == "sk-flag"
    assert key_of("--api-key-file", str(path), **IN_ENVIRONMENT) == "sk-file"
    assert key_of("--api-key", "", **IN_ENVIRONMENT) == ""


def test_one_source_is_enough(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        key_of("--api-key", "a", "--api-key-file", str(tmp_path))


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel", "a\x00b"])
def test_what_fits_into_no_header_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        key_of(**{API_KEY_VARIABLE: key})
    assert key not in str(caught.value)


def test_a_file_of_bytes_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError):
        key_of("--api-key-file", str(path))


async def test_chat_and_batch_before_a_gateway_that_asks_for_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file, source, target = tmp_path / "key", tmp_path / "in", tmp_path / "out"
    key_file.write_text(KEY)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source.write_text(json.dumps(line))
    async with gateway_before(says("Hello"), config=with_keys()) as gateway:
        url = f"--base-url=http://127.0.0.1:{gateway.port}/v1"

        async def run(*words: str) -> int:
            return await asyncio.to_thread(cli.main, [*words, url])

        assert await run("chat", "hi", "--api-key=sk-some-other-key-of-nobody") == 1
        assert "Incorrect API key" in capsys.readouterr().err
        assert await run("chat", "hi", f"--api-key={KEY}") == 0
        assert capsys.readouterr().out == "Hello\n"
        assert await run("batch", str(source), str(target), f"--api-key-file={key_file}") == 0
    assert json.loads(target.read_text())["response"]["status_code"] == 200
