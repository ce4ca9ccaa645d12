"""What a client may do, by name, with how often it does it.  Each raises Unexpected for a wrong answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.bench.soak.asker import Asker, Message, texts_of
from deploy.bench.soak.bad_input import BadInput
from deploy.bench.soak.connection import request_bytes
from deploy.bench.soak.pictures import new_document, new_picture
from deploy.bench.soak.unexpected import Unexpected

WORDS = ("what", "is", "the", "red", "circle", "left", "of", "count", "squares", "sign", "say")
LONG_ANSWER = 160  # tokens of answers that are left in the middle or read slowly
SLOW_CLIENT_BYTES = 4096  # what the kernel holds for a client that does not read
PAUSES_S = (0.0, 0.05, 0.3)
MAX_PAUSE_S = 1.5  # of one request

Act = Callable[[Asker, random.Random], Awaitable[None]]


@dataclass(frozen=True)
class Action:
    name: str
    weight: float
    act: Act


def actions(bad_inputs: Sequence[BadInput]) -> tuple[Action, ...]:
    async def send_bad_input(asker: Asker, rng: random.Random) -> None:
        await asker.send_bad(rng.choice(bad_inputs))

    return (
        Action("text, whole", 10, ask_text),
        Action("text, streamed", 10, stream_text),
        Action("known picture", 14, ask_known_picture),
        Action("repeated picture", 8, ask_repeated_picture),
        Action("new pictures", 6, ask_new_pictures),
        Action("document", 1, ask_about_document),
        Action("conversation", 5, converse),
        Action("leave before the first token", 8, leave_before_first_token),
        Action("leave in the middle", 8, leave_in_the_middle),
        Action("leave while sending", 3, leave_while_sending),
        Action("send slowly", 2, send_slowly),
        Action("read slowly", 4, read_slowly),
        Action("connect and wait", 3, connect_and_wait),
        Action("bad input", 16, send_bad_input),
        Action("no HTTP", 2, send_no_http),
    )


async def ask_text(asker: Asker, rng: random.Random) -> None:
    async with asker.connection() as connection:
        for _ in range(rng.randint(1, 3)):
            await asker.ask(connection, _text(rng), **_sampling(rng))


async def stream_text(asker: Asker, rng: random.Random) -> None:
    async with asker.connection() as connection:
        for _ in range(rng.randint(1, 3)):
            async for _texts in asker.stream(connection, _text(rng), **_sampling(rng)):
                pass


async def ask_known_picture(asker: Asker, rng: random.Random) -> None:
    turn = rng.randrange(asker.num_turns)
    async with asker.connection() as connection:
        if rng.random() < 0.5:
            texts = await asker.ask(connection, asker.conversation(turn), temperature=0)
            asker.check_answer(turn, texts[0])
        else:
            async for streamed in asker.stream(connection, asker.conversation(turn), temperature=0):
                last = streamed
            asker.check_answer(turn, last[0])


async def ask_repeated_picture(asker: Asker, rng: random.Random) -> None:
    async with asker.connection() as connection:
        await asker.ask(connection, _user(asker.pictures.repeated(rng), _words(rng)), **_sampling(rng))


async def ask_new_pictures(asker: Asker, rng: random.Random) -> None:
    """Some under a salt, which keeps them from everybody else."""
    pictures = [await asyncio.to_thread(new_picture, rng) for _ in range(rng.randint(1, 3))]
    salt = {"cache_salt": str(rng.random())} if rng.random() < 0.3 else {}
    async with asker.connection() as connection:
        await asker.ask(connection, _user(*pictures, _words(rng)), **_sampling(rng), **salt)


async def ask_about_document(asker: Asker, rng: random.Random) -> None:
    document = await asyncio.to_thread(new_document, rng)
    async with asker.connection() as connection:
        await asker.ask(connection, _user(document, _words(rng)), **_sampling(rng))


async def converse(asker: Asker, rng: random.Random) -> None:
    """Two turns about a new picture on one connection."""
    messages = _user(await asyncio.to_thread(new_picture, rng), _words(rng))
    async with asker.connection() as connection:
        answer = (await asker.ask(connection, messages, temperature=0))[0]
        messages += [{"role": "assistant", "content": answer}, *_text(rng)]
        await asker.ask(connection, messages, temperature=0)


async def leave_before_first_token(asker: Asker, rng: random.Random) -> None:
    content = [await asyncio.to_thread(new_picture, rng)] if rng.random() < 0.6 else []
    fields = {"stream": rng.random() < 0.5, "max_tokens": LONG_ANSWER, "ignore_eos": True}
    request = request_bytes(asker.body(_user(*content, _words(rng)), **fields))
    async with asker.connection() as connection:
        await connection.send(request)
        await asyncio.sleep(rng.choice((0.0, 0.01, 0.1, 0.4)) * rng.random())
        if rng.random() < 0.5:
            connection.abort()


async def leave_in_the_middle(asker: Asker, rng: random.Random) -> None:
    content = [asker.pictures.repeated(rng)] if rng.random() < 0.4 else []
    left, num_choices = rng.randint(1, 40), rng.choice((1, 1, 2))
    messages = _user(*content, _words(rng))
    fields = {"max_tokens": LONG_ANSWER, "ignore_eos": True, "n": num_choices}
    async with asker.connection() as connection:
        async for _texts in asker.stream(connection, messages, **fields):
            left -= 1
            if not left:
                break
        if rng.random() < 0.5:
            connection.abort()


async def leave_while_sending(asker: Asker, rng: random.Random) -> None:
    request = request_bytes(asker.body(_user(asker.pictures.known, _words(rng))))
    async with asker.connection() as connection:
        await connection.send(request[: rng.randrange(1, len(request))])
        await asyncio.sleep(0.1 * rng.random())


async def send_slowly(asker: Asker, rng: random.Random) -> None:
    request = request_bytes(asker.body(asker.conversation(0), temperature=0))
    cuts = sorted(rng.randrange(len(request)) for _ in range(3))
    async with asker.connection() as connection:
        for start, end in zip((0, *cuts), (*cuts, len(request)), strict=True):
            await connection.send(request[start:end])
            await asyncio.sleep(rng.choice(PAUSES_S))
        head, body = await asker.read(connection)
    asker.check_answer(0, texts_of(head, body, 1)[0])


async def read_slowly(asker: Asker, rng: random.Random) -> None:
    """An answer with large events; the server must hold what the client does not take."""
    left_s = MAX_PAUSE_S
    fields = {"max_tokens": LONG_ANSWER, "ignore_eos": True, "n": 2, "logprobs": True, "top_logprobs": 20}
    async with asker.connection(SLOW_CLIENT_BYTES) as connection:
        async for _texts in asker.stream(connection, _text(rng), **fields):
            pause_s = min(rng.choice(PAUSES_S), left_s)
            left_s -= pause_s
            await asyncio.sleep(pause_s)


async def connect_and_wait(asker: Asker, rng: random.Random) -> None:
    """Says nothing, or half a head, or has asked before."""
    async with asker.connection() as connection:
        kind = rng.randrange(3)
        if kind == 1:
            await connection.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: so")
        elif kind == 2:
            await asker.ask(connection, _text(rng))
        await asyncio.sleep(2 * rng.random())


async def send_no_http(asker: Asker, rng: random.Random) -> None:
    """The server says that this is a bad request, and closes."""
    async with asker.connection() as connection:
        await connection.send(rng.choice((b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"HELO soak\r\n\r\n")))
        answer = await connection.read_end()
    if answer and not answer.startswith(b"HTTP/1.1 400 "):
        raise Unexpected(f"400 expected, got {answer[:500]!r}")


def _user(*content: str | dict[str, Any]) -> list[Message]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


def _text(rng: random.Random) -> list[Message]:
    return [{"role": "user", "content": _words(rng)}]


def _words(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 24)))


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Parameters as clients mix them."""
    choices: tuple[dict[str, Any], ...] = (
        {"temperature": 0},
        {"temperature": 1.2, "top_p": 0.9, "seed": rng.randrange(1000)},
        {"n": rng.randint(2, 4), "temperature": 0.8, "top_k": 20},
        {"stop": ["e", "\n"], "min_p": 0.05},
        {"logprobs": True, "top_logprobs": 5, "repetition_penalty": 1.2},
        {"max_tokens": 1, "frequency_penalty": 0.5, "logit_bias": {"7": -5}},
    )
    return rng.choice(choices)
