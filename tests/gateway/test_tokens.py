"""Tokenize and detokenize, and the version."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.gateway.scripted import MODEL, ScriptedLLM, gateway_before, says, serving
from tests.pictures import data_uri


@pytest.mark.parametrize("root", ["", "/v1"])
async def test_a_text_goes_to_ids_and_back(root: str) -> None:
    async with gateway_before() as gateway:
        ids = (await gateway.post({"model": MODEL, "prompt": "Hi"}, f"{root}/tokenize")).json()
        text = (await gateway.post({"tokens": ids["tokens"]}, f"{root}/detokenize")).json()
    assert ids == {"count": 2, "max_model_len": 4096, "tokens": [72, 105], "token_strs": None}
    assert text == {"prompt": "Hi"}


async def test_a_conversation_goes_through_the_template() -> None:
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    async with gateway_before() as gateway:
        ids = (await gateway.post({"messages": messages}, "/tokenize")).json()
    assert ids["count"] == 10
    (request,) = gateway.llm.tokenized
    assert [message.role for message in request.messages.messages] == ["system", "user"]


IMAGE = {"type": "image_url", "image_url": data_uri(b"\x89PNG\r\n\x1a\n")}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "invalid_value", None),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_value", None),
        ("/tokenize", {"prompt": 1}, "invalid_type", "prompt"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "unsupported_content_part",
            "messages",
        ),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "invalid_value", "return_token_strs"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model_not_found", "model"),
        ("/detokenize", {}, "missing_required_parameter", "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "invalid_type", "tokens.0"),
        ("/detokenize", {"tokens": [0x110000]}, "invalid_value", "tokens"),
    ],
)
async def test_what_is_wrong_is_named(path: str, body: Any, code: str, param: str | None) -> None:
    async with gateway_before() as gateway:
        status, got, place, message = await gateway.error(body, path)
    assert (status, got, place) == (404 if code == "model_not_found" else 400, code, param), message


async def test_without_a_language_model_it_is_503() -> None:
    async with gateway_before() as gateway:
        await gateway.post({"prompt": "a"}, "/tokenize")
        await gateway.llm.stop()
        response = await gateway.post({"prompt": "a"}, "/tokenize")
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1


async def test_the_version_is_said() -> None:
    async with gateway_before() as gateway:
        response = await gateway.http.get("/version")
    assert set(response.json()) == {"version"} and response.json()["version"][0].isdigit()


async def test_another_language_model_is_asked_when_one_is_gone() -> None:
    gone, there = ScriptedLLM(says("x")), ScriptedLLM(says("x"))
    ports = [await gone.listen(), await there.listen()]
    async with serving(*(f"127.0.0.1:{port}" for port in ports)) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            await gone.stop()
            answers = [(await http.post("/tokenize", json={"prompt": "a"})).json() for _ in range(3)]
    await there.stop()
    assert [answer["tokens"] for answer in answers] == [[97]] * 3
