"""The conversation in the terminal: turns, pictures, commands, what goes wrong."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.chat import Chat, ChatCommand, converse, options_of, sort_words
from deploy.cli import UsageError
from deploy.completions import Completions
from deploy.demo import PICTURE


class Gateway:
    """Answers each question with its number; refuses the questions named in `refused`."""

    def __init__(self, *refused: str) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._refused = refused

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if body["messages"][-1]["content"] in self._refused:
            return httpx.Response(429, json={"error": {"message": "queue full"}})
        event = {"choices": [{"delta": {"content": f"answer {len(self.bodies)}"}}]}
        return httpx.Response(200, text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")


def talk(gateway: Gateway, *lines: str, system: str | None = None, **options: Any) -> tuple[str, list[str]]:
    """(what was printed, notes) of a conversation that is typed line by line."""
    out, notes = io.StringIO(), []
    client = Completions("http://gateway/v1", httpx.MockTransport(gateway))
    converse(Chat(client, "m", out, system, **options), iter(lines), notes.append)
    return out.getvalue(), notes


def roles(body: dict[str, Any]) -> list[str]:
    return [message["role"] for message in body["messages"]]


def test_every_question_carries_the_conversation_so_far() -> None:
    gateway = Gateway()
    printed, _ = talk(gateway, "first\n", "\n", "second\n")
    assert printed == "answer 1\nanswer 2\n"
    assert [message["content"] for message in gateway.bodies[1]["messages"]] == [
        "first",
        "answer 1",
        "second",
    ]
    assert roles(gateway.bodies[1]) == ["user", "assistant", "user"]


def test_a_picture_goes_with_the_next_message_only() -> None:
    gateway = Gateway()
    _, notes = talk(gateway, f"/image {PICTURE}\n", "what is it?\n", "and now?\n")
    assert "cafe.jpg goes with the next message" in notes
    first, second = gateway.bodies[0]["messages"][-1], gateway.bodies[1]["messages"][-1]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert second["content"] == "and now?"
    assert gateway.bodies[1]["messages"][0] == first


def test_a_refused_question_is_told_and_forgotten_but_its_picture_stays() -> None:
    gateway = Gateway("refuse me")
    _, notes = talk(gateway, "refuse me\n", "again\n")
    assert "queue full (HTTP 429)" in notes
    assert [message["content"] for message in gateway.bodies[1]["messages"]] == ["again"]


def test_new_forgets_all_but_the_system_message() -> None:
    gateway = Gateway()
    talk(gateway, "first\n", f"/image {PICTURE}\n", "/new\n", "second\n", system="be brief", temperature=0.0)
    assert [message["content"] for message in gateway.bodies[1]["messages"]] == ["be brief", "second"]
    assert gateway.bodies[1]["temperature"] == 0.0


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--temperature", "0"], {"temperature": 0.0}),
        (
            ["--temperature", "0.5", "--max-tokens", "7", "--seed", "0"],
            {"temperature": 0.5, "max_tokens": 7, "seed": 0},
        ),
    ],
)
def test_what_was_not_given_is_left_to_the_server(words: list[str], options: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    ChatCommand().add_arguments(parser)
    gateway = Gateway()
    talk(gateway, "first\n", **options_of(parser.parse_args(words)))
    [body] = gateway.bodies
    assert body.keys() == {"model", "messages", "stream", "stream_options"} | options.keys()
    assert {name: body[name] for name in options} == options


def test_quit_ends_and_an_unknown_command_shows_the_help() -> None:
    gateway = Gateway()
    _, notes = talk(gateway, "/imgae x\n", "/quit\n", "never asked\n")
    assert len(notes) == 2 and notes[0] == notes[1] and not gateway.bodies


def test_a_picture_that_is_not_there_is_told() -> None:
    _, notes = talk(Gateway(), "/image /no/such.png\n")
    assert notes[-1] == "no such file: /no/such.png"


def test_words_are_pictures_and_one_question(tmp_path: Path) -> None:
    scan = tmp_path / "scan"
    scan.touch()
    assert sort_words([str(PICTURE), "what is this?", str(scan)]) == ([PICTURE, scan], "what is this?")
    assert sort_words([]) == ([], None)
    assert sort_words(["x" * 5000]) == ([], "x" * 5000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.JPG", "what?"], "no such file: missing.JPG"),
        (["what", "is this"], "one question at most"),
    ],
)
def test_words_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sort_words(words)
