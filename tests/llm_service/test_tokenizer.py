"""What holds for every kind of tokenizer: plain text is never special, bytes add up, bad files are named."""

from __future__ import annotations

import json
import threading
import time
import unicodedata
from pathlib import Path

import pytest

from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import CheckpointError
from tests.llm_service.vocabularies import TEXTS, write_byte_level, write_sentencepiece


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_never_yields_a_special_id(byte_level: Path, internlm2: Path, text: str) -> None:
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode_plain(text)
        assert not any(tokenizer.is_special(token_id) for token_id in ids)


def test_plain_text_survives_the_round_trip(byte_level: Path, internlm2: Path) -> None:
    for text in TEXTS:
        byte_tokenizer, piece_tokenizer = load_tokenizer(byte_level), load_tokenizer(internlm2)
        nfc = unicodedata.normalize("NFC", text)
        assert byte_tokenizer.decode(byte_tokenizer.encode_plain(text)) == nfc
        assert piece_tokenizer.decode(piece_tokenizer.encode_plain(text)) == text


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: Path, internlm2: Path) -> None:
    """The event loop is one of them: all streams would stop for as long as somebody's megabyte takes."""
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        encoding = threading.Thread(target=tokenizer.encode_plain, args=("The fox, " * 100_000,))
        encoding.start()
        turns = 0
        while encoding.is_alive():
            time.sleep(0.001)
            turns += 1
        assert turns > 20, folder


def test_code_of_a_checkpoint_never_runs(byte_level: Path, internlm2: Path, tmp_path: Path) -> None:
    for source in (byte_level, internlm2):
        folder = tmp_path / source.name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        marker = tmp_path / "executed"
        code = f"open({str(marker)!r}, 'w')\nclass InternLM2Tokenizer: pass\n"
        (folder / "tokenization_internlm2.py").write_text(code)
        path = folder / "tokenizer_config.json"
        module = "tokenization_internlm2.InternLM2Tokenizer"
        config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [module, module]}}
        path.write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": module}}))
        assert load_tokenizer(folder).token_id("<IMG_CONTEXT>") > 0
        assert not marker.exists()


def test_token_bytes_joined_are_the_bytes_of_the_text(byte_level: Path, internlm2: Path) -> None:
    text = "naïve 猫 👩‍👩‍👧 <0x41>\n"
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode_plain(text))
        assert joined.removeprefix(b" ") == text.encode()


def test_special_tokens_are_shown_only_when_asked(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode(tokenizer.split_specials("<ref>the fox</ref><box>[[1, 2, 3, 4]]</box>"))
    assert tokenizer.decode(ids) == "the fox[[1, 2, 3, 4]]"
    assert tokenizer.decode(ids, False) == "<ref>the fox</ref><box>[[1, 2, 3, 4]]</box>"


def test_ids_without_a_token_have_no_text(byte_level: Path, internlm2: Path) -> None:
    for folder in (byte_level, internlm2):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
        assert not tokenizer.is_special(tokenizer.vocab_size + 7)


def test_a_missing_token_is_named(byte_level: Path) -> None:
    with pytest.raises(CheckpointError, match="<video>"):
        load_tokenizer(byte_level).token_id("<video>")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.model": "", "tokenizer_config.json": "["}, "cannot be read as JSON"),
        (
            {"tokenizer.model": "", "tokenizer_config.json": '{"tokenizer_class": "Own"}'},
            "'Own' is not known",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_refused(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=problem):
        load_tokenizer(tmp_path)


def test_tokenizers_that_append_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="add_eos_token"):
        load_tokenizer(write_byte_level(tmp_path / "fast", add_eos_token=True))
    with pytest.raises(CheckpointError, match="add_eos_token"):
        load_tokenizer(write_sentencepiece(tmp_path / "slow", True, add_eos_token=True))
