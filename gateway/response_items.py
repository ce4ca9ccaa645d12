"""Output items of `/v1/responses` as JSON, and the events that tell of them in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.answer_items import Closed, Grew, Item, Opened, Step
from gateway.completion import logprobs_json
from gateway.events import TokenLogprob

NamedEvent = tuple[str, dict[str, Any]]  # without "response." and the sequence number

_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}
_PARTS = {"reasoning": "reasoning_text", "text": "output_text"}


def item_json(item: Item, request_id: str, status: str) -> dict[str, Any]:
    """Without what it says while it is in progress."""
    is_begun = status != "in_progress"
    head = {"id": _id(item, request_id), "status": status}
    if item.call is not None:
        arguments = item.call.arguments if is_begun else ""
        call = {"call_id": item.call.id, "name": item.call.name, "arguments": arguments}
        return {**head, "type": "function_call", **call}
    content = [_part(item)] if is_begun else []
    if item.kind == "reasoning":
        return {**head, "type": "reasoning", "summary": [], "content": content}
    return {**head, "type": "message", "role": "assistant", "content": content}


def events_of(step: Step, request_id: str, status: str) -> Iterator[NamedEvent]:
    """`status`: of an item that is closed by it."""
    item = step.item
    place = {"item_id": _id(item, request_id), "output_index": item.index}
    if item.kind != "call":
        place["content_index"] = 0
    if isinstance(step, Opened):
        shown = item_json(item, request_id, "in_progress")
        yield "output_item.added", {"output_index": item.index, "item": shown}
        if item.kind != "call":
            yield "content_part.added", {**place, "part": _part(Item(item.index, item.kind))}
    elif isinstance(step, Grew):
        yield f"{_stem(item)}.delta", {**place, "delta": step.piece, **_logprobs(item, step.logprobs)}
    elif isinstance(step, Closed):
        yield f"{_stem(item)}.done", {**place, **_said(item)}
        if item.kind != "call":
            yield "content_part.done", {**place, "part": _part(item)}
        shown = item_json(item, request_id, status)
        yield "output_item.done", {"output_index": item.index, "item": shown}


def _id(item: Item, request_id: str) -> str:
    suffix = f"_{item.index}" if item.index else ""
    return f"{_PREFIXES[item.kind]}_{request_id}{suffix}"


def _stem(item: Item) -> str:
    return _PARTS.get(item.kind, "function_call_arguments")


def _said(item: Item) -> dict[str, Any]:
    if item.call is not None:
        return {"name": item.call.name, "arguments": item.call.arguments}
    return {"text": item.text, **_logprobs(item, tuple(item.logprobs))}


def _part(item: Item) -> dict[str, Any]:
    part = {"type": _PARTS[item.kind], "text": item.text}
    annotations: dict[str, Any] = {"annotations": []} if item.kind == "text" else {}
    return {**part, **annotations, **_logprobs(item, tuple(item.logprobs))}


def _logprobs(item: Item, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    return {"logprobs": logprobs_json(logprobs)} if item.kind == "text" else {}
