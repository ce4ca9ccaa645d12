"""What happens when each part dies, and what bad input gets: real processes, real pictures."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from deploy.embedded import embedded_checkpoint
from tests.pictures import image_part, picture, text_part, user
from tests.processes import Stack, wait_idle
from tests.scenes import TILED, sign, things

SAY = "What does the sign say?"
GREETING = "Hello! I am Tessera's demo model. Ask me about a picture."


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The demo model: what is answered at all is answered right."""
    with Stack(embedded_checkpoint(), "--num-kv-blocks", "256", "--max-images", "4") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(stack: Stack) -> Iterator[None]:
    """After every test all blocks are free, nothing runs, and an ordinary request gets its answer."""
    yield
    wait_idle(stack.llm)
    assert answer_of(ask(stack, user(text_part("Hello!")))) == GREETING


def ask(stack: Stack, messages: Any, **more: Any) -> httpx.Response:
    body = {"messages": messages, "max_tokens": 48, "temperature": 0, **more}
    return httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)


def answer_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return dict(error)


class TestEncoderDies:
    def test_kill_with_a_picture_in_flight(self, stack: Stack) -> None:
        """A clear 503 within 2 s, text goes on meanwhile, and pictures work again after a restart."""
        known = user(image_part(sign("OPEN")), text_part(SAY))
        in_flight = user(image_part(sign("CLOSED")), text_part(SAY))
        assert answer_of(ask(stack, known)) == "OPEN"

        async def scenario() -> tuple[httpx.Response, float, httpx.Response]:
            async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
                stack.encoder.pause()  # so that the picture is certainly still in flight
                pending = asyncio.create_task(
                    client.post("/v1/chat/completions", json={"messages": in_flight})
                )
                await asyncio.sleep(0.2)
                stack.encoder.kill()
                killed = time.monotonic()
                text = await client.post(
                    "/v1/chat/completions",
                    json={"messages": user(text_part("Hello!")), "temperature": 0},
                )
                return await pending, time.monotonic() - killed, text

        response, seconds, text = asyncio.run(scenario())
        assert response.status_code == 503 and seconds < 2
        assert "encoder" in error_of(response)["message"]
        assert answer_of(text) == GREETING
        refused = ask(stack, user(image_part(sign("EXIT")), text_part(SAY)))
        assert refused.status_code == 503
        llm, gateway = stack.llm.process.pid, stack.gateway.process.pid
        stack.restart_encoder()
        stack.wait_ready()
        assert answer_of(ask(stack, in_flight)) == "CLOSED"
        assert answer_of(ask(stack, known)) == "OPEN"
        assert (stack.llm.process.poll(), stack.gateway.process.poll()) == (None, None)
        assert (stack.llm.process.pid, stack.gateway.process.pid) == (llm, gateway)

    @pytest.mark.parametrize("seconds", [0.05, 0.15, 0.2, 0.25, 0.3, 0.45])
    def test_kill_while_tiles_arrive(self, stack: Stack, seconds: float) -> None:
        """After the layout: a 503 or the right answer within 2 s, and the same pictures work afterwards."""
        pictures = [image_part(sign(word, TILED[7])) for word in ("BANK", "EXIT", "OPEN")]
        body = {"messages": user(*pictures, text_part("What does the last image say?")), "temperature": 0}
        body["cache_salt"] = str(seconds)  # so that no tile is known

        async def scenario() -> tuple[httpx.Response, float]:
            async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
                pending = asyncio.create_task(client.post("/v1/chat/completions", json=body))
                await asyncio.sleep(seconds)
                stack.encoder.kill()
                killed = time.monotonic()
                return await pending, time.monotonic() - killed

        try:
            response, elapsed = asyncio.run(scenario())
        finally:
            stack.restart_encoder()
            stack.wait_ready()
        assert answer_of(ask(stack, body["messages"])) == "OPEN" and elapsed < 2
        if response.status_code == 200:
            assert answer_of(response) == "OPEN"
        else:
            assert response.status_code == 503 and "encoder" in error_of(response)["message"]

    def test_an_encoder_that_hangs_counts_as_dead(self, stack: Stack) -> None:
        stack.encoder.pause()
        start = time.monotonic()
        try:
            response = ask(stack, user(image_part(sign("TAXI")), text_part(SAY)))
        finally:
            stack.encoder.resume()
        assert response.status_code in (503, 504) and time.monotonic() - start < 15
        stack.wait_ready()
        assert answer_of(ask(stack, user(image_part(sign("TAXI")), text_part(SAY)))) == "TAXI"

    def test_a_known_picture_needs_no_encoder(self, stack: Stack) -> None:
        conversation = user(image_part(sign("HOTEL")), text_part(SAY))
        first = ask(stack, conversation)
        stack.encoder.pause()
        try:
            second = ask(stack, conversation)
        finally:
            stack.encoder.resume()
        assert answer_of(first) == answer_of(second) == "HOTEL"
        assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


class TestCancel:
    """Cancel a stream at every stage: all blocks and slots come back (see `nothing_is_left`)."""

    @pytest.mark.parametrize("seconds", [0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3])
    def test_after_some_time(self, stack: Stack, seconds: float) -> None:
        number = int(seconds * 1000)

        async def scenario() -> None:
            async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
                requests = [
                    asyncio.create_task(
                        client.post(
                            "/v1/chat/completions",
                            json={
                                "messages": user(
                                    image_part(picture(100 + 10 * number + index, 300, 200)),
                                    text_part("tell me"),
                                ),
                                "max_tokens": 400,
                                "ignore_eos": True,
                            },
                        )
                    )
                    for index in range(3)
                ]
                await asyncio.sleep(seconds)
                for request in requests:
                    request.cancel()
                await asyncio.gather(*requests, return_exceptions=True)

        asyncio.run(scenario())

    def test_while_waiting_for_an_encoder_that_hangs(self, stack: Stack) -> None:
        stack.encoder.pause()
        try:
            with pytest.raises(httpx.ReadTimeout):
                body = {"messages": user(image_part(picture(7)), text_part("?"))}
                httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=0.2)
            wait_idle(stack.llm)
        finally:
            stack.encoder.resume()
        stack.wait_ready()

    def test_mid_stream(self, stack: Stack) -> None:
        body = {
            "messages": user(image_part(picture(8)), text_part("tell me")),
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", f"{stack.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            for _ in range(6):
                next(lines)


def png_bomb(side: int) -> bytes:
    """A valid PNG of side x side black pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def blank(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "navy").save(file, "PNG")
    return file.getvalue()


def animated_gif() -> bytes:
    """A circle that is red, then green, then blue."""
    circles = [things({"center": f"{color} circle"}) for color in ("red", "green", "blue")]
    frames = [Image.open(io.BytesIO(circle)) for circle in circles]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


BAD_PICTURES = {
    "not an image": b"hello, I am a text file",
    "empty": b"",
    "truncated": picture(9)[:-200],
    "cut in the header": picture(9)[:20],
    "1x1": blank(1, 1),
    "1x20000": blank(1, 20_000),
    "bomb": png_bomb(30_000),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


class TestBadInput:
    @pytest.mark.parametrize("kind", BAD_PICTURES)
    def test_bad_pictures_are_named(self, stack: Stack, kind: str) -> None:
        messages = user(text_part("look"), image_part(picture(10)), image_part(BAD_PICTURES[kind]))
        response = ask(stack, messages)
        assert response.status_code == 400, response.text
        assert str(error_of(response)["param"]).startswith("messages.0.content.2")

    @pytest.mark.parametrize("url", ["https://example.org/a.png", "http://169.254.169.254/latest"])
    def test_urls_are_not_fetched_unless_allowed(self, stack: Stack, url: str) -> None:
        part = {"type": "image_url", "image_url": {"url": url}}
        response = ask(stack, user(text_part("look"), image_part(picture(10)), part))
        assert response.status_code == 400, response.text
        error = error_of(response)
        assert (error["code"], error["param"]) == ("invalid_image_url", "messages.0.content.2.image_url.url")
        assert error["message"] == "fetching URLs is not enabled on this server"

    def test_a_bad_picture_disturbs_nobody_else(self, stack: Stack) -> None:
        async def scenario() -> list[httpx.Response]:
            good = user(image_part(sign("MUSEUM", TILED[3])), text_part(SAY))
            bad = user(image_part(BAD_PICTURES["truncated"]), text_part(SAY))
            async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
                posts = [
                    client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0})
                    for messages in (good, bad, good, bad)
                ]
                return list(await asyncio.gather(*posts))

        responses = asyncio.run(scenario())
        assert [response.status_code for response in responses] == [200, 400, 200, 400]
        assert [answer_of(response) for response in responses[::2]] == ["MUSEUM"] * 2

    def test_an_animated_gif_counts_as_its_first_frame(self, stack: Stack) -> None:
        response = ask(stack, user(image_part(animated_gif()), text_part("What color is the circle?")))
        assert answer_of(response) == "red"

    def test_prompt_too_long(self, stack: Stack) -> None:
        response = ask(stack, user(text_part("word " * 20_000)))
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert error_of(response)["param"] == "messages"

    def test_too_many_pictures(self, stack: Stack) -> None:
        response = ask(stack, user(*(image_part(picture(20 + index)) for index in range(5))))
        assert response.status_code == 400
        assert str(error_of(response)["param"]).startswith("messages")

    @pytest.mark.parametrize("word", ["<IMG_CONTEXT>", "<image>", "<img></img>", "<|im_end|>"])
    def test_text_that_spells_a_placeholder_is_text(self, stack: Stack, word: str) -> None:
        """design.md: it stays text.  Its tokens are those of its letters, so the counts still agree."""
        with_picture = user(image_part(picture(12)), text_part(f"what is {word}?"))
        response = ask(stack, with_picture)
        assert response.status_code == 200
        usage = response.json()["usage"]
        plain = ask(stack, user(image_part(picture(12)), text_part("what is ?"))).json()["usage"]
        assert (
            usage["prompt_tokens_details"]["image_tokens"] == plain["prompt_tokens_details"]["image_tokens"]
        )
        assert usage["prompt_tokens"] >= plain["prompt_tokens"] + 3

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"messages": []}, "messages"),
            ({}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
            ({"messages": user({"type": "image_url", "image_url": {"url": 5}})}, "messages.0.content.0"),
            ({"messages": user({"type": "text", "text": 7})}, "messages.0.content.0"),
            ({"messages": user(text_part("x")), "temperature": "hot"}, "temperature"),
            ({"messages": user(text_part("x")), "temperature": 9}, "temperature"),
            ({"messages": user(text_part("x")), "max_tokens": 0}, "max_tokens"),
            ({"messages": user(text_part("x")), "n": 100_000}, "n"),
            ({"messages": user(text_part("x")), "logit_bias": {"999999": 1}}, "logit_bias"),
            ({"messages": user(text_part("x")), "stop": [""]}, "stop"),
            ({"messages": user(image_part(picture(13), max_dynamic_patch=0))}, "messages.0.content.0"),
            ({"messages": user(image_part(picture(13), max_dynamic_patch=999))}, "messages.0.content.0"),
        ],
    )
    def test_wrong_types_and_ranges(self, stack: Stack, body: dict[str, Any], param: str) -> None:
        response = httpx.post(f"{stack.url}/v1/chat/completions", content=json.dumps(body), timeout=60)
        assert response.status_code == 400, response.text
        assert str(error_of(response)["param"]).startswith(param)

    def test_not_json(self, stack: Stack) -> None:
        response = httpx.post(f"{stack.url}/v1/chat/completions", content=b"{nope", timeout=60)
        assert response.status_code == 400
        error_of(response)


def engine_pid(stack: Stack) -> int:
    children = Path(f"/proc/{stack.llm.process.pid}/task/{stack.llm.process.pid}/children")
    return int(children.read_text().split()[0])


class TestLanguageModelDies:
    def test_an_engine_that_hangs_is_found_out_and_taken_back(self) -> None:
        """What it was doing for clients fails with a 503, health says so, and both end when it goes on."""
        body = {"messages": user(text_part("Hello!")), "temperature": 0}
        with Stack(embedded_checkpoint(), "--engine-timeout-s", "2") as stack:
            assert answer_of(ask(stack, body["messages"])) == GREETING
            os.kill(engine_pid(stack), signal.SIGSTOP)
            in_flight = httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)
            assert in_flight.status_code == 503
            assert "no progress" in error_of(in_flight)["message"]
            assert ask(stack, body["messages"]).status_code == 503
            os.kill(engine_pid(stack), signal.SIGCONT)
            deadline = time.monotonic() + 20
            while ask(stack, body["messages"]).status_code == 503:
                assert time.monotonic() < deadline, "it is not taken back"
                time.sleep(0.05)
            assert answer_of(ask(stack, body["messages"])) == GREETING

    def test_the_engine_takes_its_service_down_and_clients_hear_of_it(self) -> None:
        with Stack(embedded_checkpoint(), "--num-kv-blocks", "256") as stack:
            os.kill(engine_pid(stack), signal.SIGKILL)
            assert stack.llm.process.wait(20) != 0
            response = ask(stack, user(text_part("anybody?")))
            assert response.status_code == 503
            assert "connect" not in error_of(response)["message"].lower()
