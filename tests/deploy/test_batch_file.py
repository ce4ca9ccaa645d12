"""Batch files: what is read, refused, appended and repaired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.batch_file import BatchFileError, BatchInput, BatchOutput, BatchRequest, BatchResult

URL = "/v1/chat/completions"


def entry(custom_id: str = "a", **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"n": 1}, **changes}


def write(path: Path, *entries: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in entries))
    return path


def test_requests_are_read_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "in", *(entry(name, body={"text": "é" * 9}) for name in "abc"))
    path.write_text(path.read_text().replace("\n", "\n\n"))
    batch = BatchInput(path)
    assert batch.custom_ids == ["a", "b", "c"]
    assert list(batch.read(["c", "a"])) == [BatchRequest(name, URL, {"text": "é" * 9}) for name in "ca"]


def test_the_last_line_needs_no_end(tmp_path: Path) -> None:
    path = write(tmp_path / "in", entry())
    path.write_text(path.read_text().rstrip())
    assert BatchInput(path).custom_ids == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (entry(custom_id=""), "custom_id must be a string"),
        (entry(custom_id=7), "custom_id must be a string"),
        (entry(method="GET"), "method must be"),
        (entry(url="http://elsewhere/v1/chat/completions"), "url must be a path"),
        (entry(url="//elsewhere/v1/"), "url must be a path"),
        (entry(body=[]), "body must be an object"),
        (entry(body={"stream": True}), "no streams"),
        (["a"], "must be an object"),
        (entry("first"), "custom_id 'first' is there twice"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(BatchFileError, match=f"in, line 2: .*{message}"):
        BatchInput(write(tmp_path / "in", entry("first"), line))


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("{nonsense\n")
    with pytest.raises(BatchFileError, match="line 1: not JSON"):
        BatchInput(tmp_path / "in")


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    batch = BatchInput(write(tmp_path / "in", entry("a")))
    write(tmp_path / "in", entry("b"))
    with pytest.raises(BatchFileError, match="was changed"):
        list(batch.read(["a"]))


def test_results_have_the_forms_of_the_format(tmp_path: Path) -> None:
    output = BatchOutput(tmp_path / "out")
    output.write(BatchResult("good", 200, "req-1", {"id": "x"}))
    output.write(BatchResult("none", error_code="invalid_response", error_message="why"))
    output.close()
    good, none = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert good.pop("id").startswith("batch_req_") and none.pop("id") != good.get("id")
    response = {"status_code": 200, "request_id": "req-1", "body": {"id": "x"}}
    assert good == {"custom_id": "good", "response": response, "error": None}
    error = {"code": "invalid_response", "message": "why"}
    assert none == {"custom_id": "none", "response": None, "error": error}


def test_a_line_that_was_left_half_written_goes(tmp_path: Path) -> None:
    output = BatchOutput(tmp_path / "out")
    for name in "ab":
        output.write(BatchResult(name, 200, "", {}))
    output.close()
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole + whole[:40])
    again = BatchOutput(tmp_path / "out")
    assert again.done == {"a", "b"}
    again.write(BatchResult("c", 200, "", {}))
    again.close()
    lines = (tmp_path / "out").read_bytes().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["dear diary\nyours", "dear diary", json.dumps(entry()) + "\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").write_text(text)
    with pytest.raises(BatchFileError, match="out, line 1"):
        BatchOutput(tmp_path / "out")
    assert (tmp_path / "out").read_text() == text
