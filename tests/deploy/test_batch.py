"""`tessera batch` before a gateway that answers as a test scripts it, and one that is real."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy import cli
from deploy.batch import run_batch
from deploy.batch_file import BatchFileError
from deploy.batch_runner import BatchRunner, GatewayLost
from tests.gateway.scripted import gateway_before, says

URL = "/v1/chat/completions"
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


def write_requests(path: Path, *names: str) -> Path:
    entries = [{"custom_id": name, "method": "POST", "url": URL, "body": {"user": name}} for name in names]
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


class Gateway:
    """Answers with the request's name, after what `before` says of it and its attempt."""

    def __init__(self, before: Callable[[str, int], httpx.Response | None] = lambda *_: None) -> None:
        self.attempts: Counter[str] = Counter()
        self.paths: set[str] = set()
        self.keys: set[str | None] = set()
        self.pauses: list[float] = []
        self.running = self.most_running = 0
        self._before = before

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        name = json.loads(request.content)["user"]
        self.attempts[name] += 1
        self.paths.add(request.url.path)
        self.keys.add(request.headers.get("authorization"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        answer = httpx.Response(200, json={"name": name}, headers={"x-request-id": f"id-{name}"})
        return self._before(name, self.attempts[name]) or answer

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def runner(self, concurrency: int = 4, api_key: str = "") -> BatchRunner:
        return BatchRunner(
            "http://gateway/v1/",
            concurrency=concurrency,
            max_attempts=3,
            api_key=api_key,
            transport=httpx.MockTransport(self),
            pause=self.pause,
        )


def results(path: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    found = {entry["custom_id"]: entry for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_every_request_is_answered_and_several_run_at_a_time(tmp_path: Path, target: Path) -> None:
    names = [f"r{number}" for number in range(20)]
    gateway, out = Gateway(), io.StringIO()
    source = write_requests(tmp_path / "in", *names)
    assert run_batch(gateway.runner(api_key="secret"), source, target, out) == 0
    found = results(target)
    assert sorted(found) == sorted(names)
    expected = {"status_code": 200, "request_id": "id-r7", "body": {"name": "r7"}}
    assert found["r7"]["response"] == expected and found["r7"]["error"] is None
    assert gateway.most_running == 4
    assert (gateway.paths, gateway.keys) == ({URL}, {"Bearer secret"})
    assert out.getvalue() == "20 of 20 requests answered\n"


def test_what_has_a_result_is_not_asked_again(tmp_path: Path, target: Path) -> None:
    run_batch(Gateway().runner(), write_requests(tmp_path / "in", "a", "b"), target, io.StringIO())
    gateway, out = Gateway(), io.StringIO()
    run_batch(gateway.runner(), write_requests(tmp_path / "in", "a", "b", "c"), target, out)
    assert (set(gateway.attempts), set(results(target))) == ({"c"}, {"a", "b", "c"})
    assert out.getvalue() == "1 of 1 requests answered, 2 were there already\n"


def test_a_refusal_is_a_result(tmp_path: Path, target: Path) -> None:
    error = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "c"}}
    gateway = Gateway(lambda name, _: httpx.Response(400, json=error) if name == "bad" else None)
    out = io.StringIO()
    assert run_batch(gateway.runner(), write_requests(tmp_path / "in", "bad", "good"), target, out) == 0
    bad = results(target)["bad"]
    assert (bad["response"]["status_code"], bad["response"]["body"], bad["error"]) == (400, error, None)
    assert gateway.attempts["bad"] == 1
    assert out.getvalue() == "2 of 2 requests answered (1 failed)\n"


def test_a_full_gateway_is_asked_again_when_it_says(tmp_path: Path, target: Path) -> None:
    def before(_name: str, attempt: int) -> httpx.Response | None:
        headers = {"retry-after": "7"} if attempt == 1 else {}
        return httpx.Response(429, json={}, headers=headers) if attempt < 3 else None

    gateway = Gateway(before)
    run_batch(gateway.runner(), write_requests(tmp_path / "in", "a"), target, io.StringIO())
    assert (gateway.attempts["a"], gateway.pauses) == (3, [7.0, 1.0])
    assert results(target)["a"]["response"]["status_code"] == 200


def test_one_that_stays_full_is_believed_in_the_end(tmp_path: Path, target: Path) -> None:
    gateway = Gateway(lambda *_: httpx.Response(503, json={"error": {}}))
    run_batch(gateway.runner(), write_requests(tmp_path / "in", "a"), target, io.StringIO())
    assert gateway.attempts["a"] == 3
    assert results(target)["a"]["response"]["status_code"] == 503


def test_what_would_come_again_is_believed_at_once(tmp_path: Path, target: Path) -> None:
    headers = {"x-should-retry": "false"}
    gateway = Gateway(lambda *_: httpx.Response(503, json={"error": {}}, headers=headers))
    run_batch(gateway.runner(), write_requests(tmp_path / "in", "a"), target, io.StringIO())
    assert gateway.attempts["a"] == 1
    assert results(target)["a"]["response"]["status_code"] == 503


def test_an_answer_that_is_no_json_is_an_error_of_the_format(tmp_path: Path, target: Path) -> None:
    gateway = Gateway(lambda *_: httpx.Response(502, text="<html>"))
    run_batch(gateway.runner(), write_requests(tmp_path / "in", "a"), target, io.StringIO())
    entry = results(target)["a"]
    assert entry["response"] is None and entry["error"]["code"] == "invalid_response"


def test_a_lost_gateway_stops_the_batch_and_another_run_goes_on(tmp_path: Path, target: Path) -> None:
    def before(name: str, _attempt: int) -> None:
        if name == "c":
            raise httpx.ConnectError("refused")

    source = write_requests(tmp_path / "in", "a", "b", "c", "d")
    with pytest.raises(GatewayLost, match="no answer from http://gateway: refused"):
        run_batch(Gateway(before).runner(concurrency=1), source, target, io.StringIO())
    assert set(results(target)) == {"a", "b"}
    gateway = Gateway()
    run_batch(gateway.runner(), source, target, io.StringIO())
    assert (set(gateway.attempts), len(results(target))) == ({"c", "d"}, 4)


def test_a_bad_line_is_found_before_anything_is_asked(tmp_path: Path, target: Path) -> None:
    source = write_requests(tmp_path / "in", "a", "a")
    gateway = Gateway()
    with pytest.raises(BatchFileError):
        run_batch(gateway.runner(), source, target, io.StringIO())
    assert not gateway.attempts and not target.exists()


def test_numbers_below_one_are_wrong_usage(tmp_path: Path, target: Path) -> None:
    assert cli.main(["batch", str(tmp_path / "in"), str(target), "--concurrency=0"]) == 2


def test_a_file_that_is_not_there_is_told(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["batch", str(tmp_path / "none"), str(target)]) == 1
    assert "none" in capsys.readouterr().err


async def test_the_command_before_a_real_gateway(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "in"
    bodies = [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": 7}]
    source.write_text(
        "".join(
            json.dumps({"custom_id": str(number), "method": "POST", "url": URL, "body": body}) + "\n"
            for number, body in enumerate(bodies)
        )
    )
    async with gateway_before(says("Hello", " there")) as gateway:
        url = f"--base-url=http://127.0.0.1:{gateway.port}/v1"
        assert await asyncio.to_thread(cli.main, ["batch", str(source), str(target), url]) == 0
    found = results(target)
    assert found["0"]["response"]["body"]["choices"][0]["message"]["content"] == "Hello there"
    assert found["0"]["response"]["request_id"]
    assert found["1"]["response"]["status_code"] == 400
