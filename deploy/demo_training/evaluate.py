"""The accuracy of the demo model on held-out questions, asked of a running gateway as any client asks.

Knows the OpenAI API alone of what it measures; without --base-url it starts the three services itself.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import html
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from deploy.cli import UsageError, add_common_arguments
from deploy.completions import CompletionError, Completions, Message
from deploy.demo_training.accuracy_table import AccuracyTable, Outcome
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.held_out import NUM_QUESTIONS, PictureFile, Question, held_out_questions
from deploy.progress import Progress
from deploy.serve import ServeCommand, make_supervisor
from deploy.supervisor import PartFailed, Supervisor

MAX_TOKENS = 48
SHOWN_WRONG = 15
MAX_SHOWN = 80  # characters of an answer
PROGRESS_STEP = 50  # questions


@dataclass(frozen=True)
class Exam:
    """Questions, and how many of them are asked at once."""

    questions: Sequence[Question]
    concurrency: int
    progress: Progress

    def hold(self, base_url: str) -> tuple[str, AccuracyTable]:
        """The name of the model and how it did.  Raises CompletionError: no answer is no wrong answer."""
        client = Completions(base_url)
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            model = client.models()[0]
            outcomes = []
            for outcome in pool.map(lambda question: ask(client, model, question), self.questions):
                outcomes.append(outcome)
                if len(outcomes) % PROGRESS_STEP == 0:
                    self.progress.say(f"{len(outcomes)} of {len(self.questions)} questions answered")
            return model, AccuracyTable(outcomes)
        finally:
            pool.shutdown(cancel_futures=True)
            client.close()


def ask(client: Completions, model: str, question: Question) -> Outcome:
    """Asks one text after the other; the answers between are the model's own.  Raises CompletionError."""
    conversation: list[Message] = []
    for text in question.texts:
        pictures = [] if conversation else _picture_parts(question)
        conversation.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}]})
        start = time.perf_counter()
        pieces = client.stream(model, conversation, temperature=0, max_tokens=MAX_TOKENS)
        answer = "".join(piece.text for piece in pieces)
        seconds = time.perf_counter() - start
        conversation.append({"role": "assistant", "content": answer})
    return Outcome(question, answer, seconds)


def _picture_parts(question: Question) -> list[Message]:
    parts: list[Message] = []
    options = {} if question.max_tiles is None else {"max_dynamic_patch": question.max_tiles}
    for index, picture in enumerate(question.pictures):
        if question.labels:
            parts.append({"type": "text", "text": question.labels[index]})
        parts.append({"type": "image_url", "image_url": {"url": _data_uri(picture), **options}})
    return parts


def _data_uri(picture: PictureFile) -> str:
    return f"data:image/{picture.format};base64,{base64.b64encode(picture.data).decode()}"


def save_wrong(wrong: Sequence[Outcome], folder: Path) -> None:
    """The pictures of these outcomes as PNG, and index.html that shows them with questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, outcome in enumerate(wrong, 1):
        images = []
        for index, picture in enumerate(outcome.question.pictures, 1):
            name = f"{number:03d}-{index}.png"
            with Image.open(io.BytesIO(picture.data)) as image:
                image.save(folder / name)
            images.append(f'<img src="{name}">')
        entries.append(f"<p>{html.escape(_description(outcome))}<br>{''.join(images)}</p>")
    page = "\n".join(['<!doctype html><meta charset="utf-8"><title>Wrong answers</title>', *entries, ""])
    (folder / "index.html").write_text(page, encoding="utf-8")


def _of_every_row(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The first of each row, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    ranked = []
    for outcome in outcomes:
        seen[outcome.question.row] += 1
        ranked.append((seen[outcome.question.row], outcome))
    return [outcome for _, outcome in sorted(ranked, key=lambda pair: pair[0])]


def _description(outcome: Outcome) -> str:
    question = outcome.question
    got = repr(outcome.got if len(outcome.got) <= MAX_SHOWN else f"{outcome.got[:MAX_SHOWN]}...")
    return f"{question.row}: {' / '.join(question.texts)} — expected {question.answer!r}, got {got}"


def report(table: AccuracyTable, model: str, fonts: FontShelf, concurrency: int) -> str:
    """Markdown for the terminal and the model card."""
    together = f", {concurrency} at once" if concurrency > 1 else ""
    lines = [
        f"model {model}",
        f"fonts {', '.join(fonts.families)} ({len(fonts.faces)} faces, none of them trained on)",
        "",
        table.markdown(),
        "",
        f"{table.median_seconds:.2f} s per question (median{together})",
    ]
    if table.wrong:
        lines += ["", f"wrong ({min(SHOWN_WRONG, len(table.wrong))} of {len(table.wrong)}):"]
        lines += [f"- {_description(outcome)}" for outcome in _of_every_row(table.wrong)[:SHOWN_WRONG]]
    lines += [
        f"{score.name}: {score.percent:.1f} % is less than {score.required} %" for score in table.falls_short
    ]
    return "\n".join(lines)


async def _with_services(supervisor: Supervisor, exam: Exam) -> tuple[str, AccuracyTable]:
    """Start, ask, stop.  Raises PartFailed or CompletionError."""
    try:
        address = await supervisor.start()
        return await asyncio.to_thread(exam.hold, f"http://{address}/v1")
    finally:
        await supervisor.stop()


def _hold(exam: Exam, command: ServeCommand, arguments: argparse.Namespace) -> tuple[str, AccuracyTable]:
    if arguments.base_url is not None:
        return exam.hold(arguments.base_url)
    supervisor, _ = make_supervisor(command.flags, arguments, exam.progress)
    return asyncio.run(_with_services(supervisor, exam))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every required row is met, 1 when one falls short or the questions could not be asked."""
    command = ServeCommand()
    parser = _parser(command)
    arguments = parser.parse_args(argv)
    arguments.port = getattr(arguments, "port", 0)
    progress = Progress(sys.stderr)
    fonts = FontShelf.find("held_out", arguments.fonts)
    questions = held_out_questions(fonts, arguments.seed, arguments.questions)
    try:
        model, table = _hold(Exam(questions, arguments.concurrency, progress), command, arguments)
    except UsageError as error:
        parser.error(str(error))
    except (PartFailed, CompletionError) as error:
        progress.say(f"evaluation failed: {error}")
        return 1
    print(report(table, model, fonts, arguments.concurrency))
    if arguments.save is not None:
        save_wrong(table.wrong, arguments.save)
    if arguments.json is not None:
        faces = [face.name for face in fonts.faces]
        told = {"model": model, "seed": arguments.seed, "fonts": faces, "concurrency": arguments.concurrency}
        arguments.json.write_text(json.dumps(told | table.as_json(), indent=1) + "\n", encoding="utf-8")
    return 1 if table.falls_short else 0


def _parser(command: ServeCommand) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo_training.evaluate", description=__doc__, allow_abbrev=False
    )
    option: Callable[..., object] = parser.add_argument_group("evaluation").add_argument
    option("--base-url", metavar="URL", help="a running gateway, with /v1 (default: start the services)")
    option(
        "--questions",
        type=_positive,
        default=NUM_QUESTIONS,
        metavar="N",
        help="about so many in all, in the same proportions (default: %(default)s)",
    )
    option("--seed", type=int, default=0, help="of the questions (default: %(default)s)")
    option(
        "--concurrency", type=_positive, default=4, metavar="N", help="asked at once (default: %(default)s)"
    )
    option(
        "--fonts",
        type=_folder,
        action="append",
        default=[],
        metavar="FOLDER",
        help="further fonts to look in",
    )
    option("--json", type=Path, metavar="FILE", help="write the table and the wrong answers there, too")
    option("--save", type=Path, metavar="FOLDER", help="write the pictures of wrong answers there")
    add_common_arguments(parser, command)
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


if __name__ == "__main__":
    raise SystemExit(main())
