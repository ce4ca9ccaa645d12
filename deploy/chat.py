"""`tessera chat`: a conversation with a running gateway in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import readline  # noqa: F401  (gives input() line editing and history)
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from deploy.api_key import add_key_arguments, api_key_of
from deploy.cli import UsageError
from deploy.completions import VIDEO_TYPES, CompletionError, Completions, Message, user_message
from deploy.embedded import EMBEDDED_MODEL_NAME, EMBEDDED_MODEL_NOTE

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FILE_SUFFIXES = (*PICTURE_SUFFIXES, *VIDEO_TYPES, ".pdf")
HELP = "/image PATH adds a picture, video or PDF to the next message, /new starts over, /quit or Ctrl-D ends"


class Chat:
    """The conversation so far.  Files wait until a message takes them along."""

    def __init__(
        self, client: Completions, model: str, out: TextIO, system: str | None = None, **options: Any
    ) -> None:
        """`options` are fields of the request, such as `temperature`."""
        self._client = client
        self._model = model
        self._out = out
        self._system = system
        self._options = options
        self.start_over()

    def start_over(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[Message] = []
        self.files: list[Path] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def ask(self, text: str) -> None:
        """Print the answer as it comes.  A question that failed leaves the conversation as it was.

        Raises:
            CompletionError, OSError: refused or broken off; a file cannot be read.
        """
        question = user_message(text, self.files)
        answer = ""
        pieces = self._client.stream(self._model, [*self.messages, question], **self._options)
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    answer += piece.text
                    print(piece.text, end="", file=self._out, flush=True)
        except KeyboardInterrupt:  # closing the stream has cancelled the request
            print(" [stopped]", end="", file=self._out)
        finally:
            print(file=self._out)
        self.messages += [question, {"role": "assistant", "content": answer}]
        self.files = []


class ChatCommand:
    log_level = "warning"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "words",
            nargs="*",
            metavar="FILE|QUESTION",
            help="pictures, videos and PDFs for the first message; with a question: answer it and end",
        )
        parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
        add_key_arguments(parser)
        parser.add_argument("--model", help="id of the model (default: the first that the gateway names)")
        parser.add_argument("--system", metavar="TEXT", help="system message")
        parser.add_argument("--max-tokens", type=int, metavar="INT", help="most tokens of an answer")
        parser.add_argument(
            "--temperature", type=float, metavar="FLOAT", help="0 is greedy (default: the server's)"
        )
        parser.add_argument("--seed", type=int, metavar="INT", help="makes sampling repeatable")

    def run(self, arguments: argparse.Namespace) -> int:
        files, question = sort_words(arguments.words)
        try:
            key = api_key_of(arguments, os.environ)
            with contextlib.closing(Completions(arguments.base_url, api_key=key)) as client:
                _run(client, arguments, files, question)
        except (CompletionError, OSError) as error:
            note(f"tessera chat: {error}")
            return 1
        return 0


def _run(client: Completions, arguments: argparse.Namespace, files: list[Path], question: str | None) -> None:
    """Raises CompletionError, OSError."""
    model = arguments.model or client.models()[0]
    chat = Chat(client, model, sys.stdout, arguments.system, **options_of(arguments))
    chat.files = files
    if question is not None:
        chat.ask(question)
        return
    if model == EMBEDDED_MODEL_NAME:
        note(EMBEDDED_MODEL_NOTE)
    converse(chat, typed_lines(sys.stdin), note)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of the request that were given: what was not is the server's to choose."""
    given = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed")}
    return {name: value for name, value in given.items() if value is not None}


def sort_words(words: list[str]) -> tuple[list[Path], str | None]:
    """Files (existing ones, or words that end like one) and the question, if there is one.

    Raises:
        UsageError: a file is missing, or there are two questions.
    """
    names = [word for word in words if word.lower().endswith(FILE_SUFFIXES) or _is_file(word)]
    questions = [word for word in words if word not in names]
    missing = [name for name in names if not _is_file(name)]
    if missing:
        raise UsageError(f"no such file: {missing[0]}")
    if len(questions) > 1:
        raise UsageError(f"one question at most (in quotes), got {questions}")
    return [Path(name) for name in names], questions[0] if questions else None


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a question can be too long for a file name
        return False


def converse(chat: Chat, lines: Iterator[str], note: Callable[[str], None]) -> None:
    """Answer line by line.  What goes wrong is told, and the conversation goes on."""
    note(HELP)
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            chat.start_over()
        elif word == "/image":
            _add_file(chat, Path(rest.strip()).expanduser(), note)
        elif word.startswith("/"):
            note(HELP)
        elif line.strip():
            try:
                chat.ask(line.strip())
            except (CompletionError, OSError) as error:
                note(str(error))


def _add_file(chat: Chat, path: Path, note: Callable[[str], None]) -> None:
    if not path.is_file():
        note(f"no such file: {path}")
        return
    chat.files.append(path)
    note(f"{path.name} goes with the next message")


def typed_lines(source: TextIO) -> Iterator[str]:
    """Lines until Ctrl-D or Ctrl-C; with a prompt and line editing on a terminal."""
    if not source.isatty():
        yield from source
        return
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
