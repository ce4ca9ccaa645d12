"""Checkpoint folders and hub ids as named tensors; everything wrong with one is named."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.checkpoint import CheckpointError, CheckpointFormat, open_checkpoint
from tests.protos.folders import CONFIG, write_folder

CHAT = {
    "vision_model.embeddings.class_embedding": torch.arange(4.0).view(1, 1, 4),
    "mlp1.0.weight": torch.ones(3, dtype=torch.bfloat16),
    "language_model.model.norm.weight": torch.full((2,), 2.0, dtype=torch.float16),
    "language_model.lm_head.weight": torch.zeros(5, 2),
}
HF = {
    "model.vision_tower.embeddings.cls_token": torch.zeros(1, 1, 4),
    "model.multi_modal_projector.layer_norm.weight": torch.zeros(3),
    "model.language_model.norm.weight": torch.zeros(2),
    "lm_head.weight": torch.zeros(5, 2),
}
OLD_HF = {name.removeprefix("model."): tensor for name, tensor in HF.items() if name != "lm_head.weight"}
HF_CONFIG = {**CONFIG, "architectures": ["InternVLForConditionalGeneration"]}


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_a_chat_checkpoint_is_read_whole_or_sharded(tmp_path: Path, num_shards: int) -> None:
    shards = [dict(list(CHAT.items())[i::num_shards]) for i in range(num_shards)]
    checkpoint = open_checkpoint(str(write_folder(tmp_path, shards)))
    assert checkpoint.format is CheckpointFormat.CHAT
    loaded = dict(checkpoint.load(CHAT))
    assert loaded.keys() == CHAT.keys()
    for name, tensor in CHAT.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("tensors", [HF, OLD_HF], ids=["new names", "old names"])
def test_an_hf_checkpoint_has_its_two_halves(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path, [tensors], HF_CONFIG)))
    assert checkpoint.format is CheckpointFormat.HF
    assert sorted(checkpoint.vision_names() + checkpoint.language_names()) == sorted(tensors)
    assert all("language_model" in name or "lm_head" in name for name in checkpoint.language_names())
    assert len(checkpoint.vision_names()) == 2


def test_an_entry_says_where_the_bytes_lie(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path, [CHAT])))
    entry = checkpoint.tensors["vision_model.embeddings.class_embedding"]
    content = entry.file.read_bytes()[entry.start : entry.end]
    assert (entry.dtype, entry.shape) == ("F32", (1, 1, 4))
    assert torch.frombuffer(bytearray(content), dtype=torch.float32).tolist() == [0, 1, 2, 3]


def test_only_the_named_half_is_read(tmp_path: Path) -> None:
    """The encoder does not touch the language model's shard when it loads."""
    vision = {name: CHAT[name] for name in list(CHAT)[:2]}
    language = {name: CHAT[name] for name in list(CHAT)[2:]}
    checkpoint = open_checkpoint(str(write_folder(tmp_path, [vision, language])))
    (file,) = {checkpoint.tensors[name].file for name in language}
    file.unlink()
    assert dict(checkpoint.load(checkpoint.vision_names())).keys() == vision.keys()


def test_loading_a_tensor_that_is_not_there_names_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path, [CHAT])))
    with pytest.raises(CheckpointError, match="'mlp1.3.weight' is missing"):
        list(checkpoint.load(["mlp1.0.weight", "mlp1.3.weight"]))


def test_an_optional_json_file_is_read_or_absent(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path, [CHAT])))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert checkpoint.read_json("generation_config.json") == {"eos_token_id": 2}
    assert checkpoint.read_json("chat_template.json") is None


ESCAPES: dict[str, Any] = {
    "shard above the folder": "../outside.safetensors",
    "shard elsewhere": "/outside.safetensors",
    "shard is a parent": "..",
    "shard is no name": ["a.safetensors"],
}


def damaged(tmp_path: Path, what: str) -> Path:
    """A folder with one thing wrong."""
    folder = write_folder(tmp_path, [dict(list(CHAT.items())[:2]), dict(list(CHAT.items())[2:])])
    first, index = folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    if what == "index names a missing tensor":
        index.write_text(json.dumps({"weight_map": weight_map | {"mlp1.9.weight": first.name}}))
    elif what == "index without a map":
        index.write_text(json.dumps({"weight_map": [first.name]}))
    elif what in ESCAPES:
        first.rename(tmp_path / "outside.safetensors")
        index.write_text(json.dumps({"weight_map": weight_map | {"mlp1.0.weight": ESCAPES[what]}}))
    elif what == "shard is missing":
        first.unlink()
    elif what == "stray tensor":
        return write_folder(tmp_path / "stray", [CHAT | {"optimizer.step": torch.zeros(1)}])
    elif what == "config is missing":
        (folder / "config.json").unlink()
    elif what == "config is no JSON":
        (folder / "config.json").write_text("{'architectures': 1}")
    elif what == "config is a list":
        (folder / "config.json").write_text("[]")
    elif what == "config is not UTF-8":
        (folder / "config.json").write_bytes(b'{"name": "\xff"}')
    elif what == "another architecture":
        (folder / "config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    elif what == "no architecture":
        (folder / "config.json").write_text("{}")
    elif what == "shard is a pickle":
        torch.save({"a": torch.zeros(1)}, first)
    elif what == "shard is empty":
        first.write_bytes(b"")
    elif what == "header is no JSON":
        first.write_bytes((16).to_bytes(8, "little") + b"not a header at all")
    elif what == "header is huge":
        first.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("index names a missing tensor", "names tensors that its shards lack: mlp1.9.weight"),
        ("index without a map", "index.json: weight_map is not a JSON object"),
        *((what, "weight_map: mlp1.0.weight lies in .*, not in a file beside it") for what in ESCAPES),
        ("shard is missing", "model-00001-of-00002.safetensors is missing"),
        ("stray tensor", "unused tensors .*: optimizer.step"),
        ("config is missing", "config.json is missing"),
        ("config is no JSON", "config.json cannot be read as JSON"),
        ("config is a list", "config.json is not a JSON object"),
        ("config is not UTF-8", "config.json cannot be read as JSON"),
        ("another architecture", "'LlavaForConditionalGeneration'; supported: InternVLChatModel"),
        ("no architecture", "architectures is None; supported"),
        ("shard is a pickle", "model-00001-of-00002.safetensors: not a safetensors file"),
        ("shard is empty", "not a safetensors file"),
        ("header is no JSON", "not a safetensors file"),
        ("header is huge", "not a safetensors file"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(damaged(tmp_path, what)))


def test_shards_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    """As in a hub's snapshot."""
    shards = [dict(list(CHAT.items())[:2]), dict(list(CHAT.items())[2:])]
    folder = write_folder(tmp_path / "snapshot", shards)
    for file in list(folder.glob("*.safetensors")):
        file.rename(tmp_path / f"blob-{file.name}")
        file.symlink_to(tmp_path / f"blob-{file.name}")
    assert open_checkpoint(str(folder)).tensors.keys() == CHAT.keys()


@pytest.mark.parametrize("value", [None, 5])
def test_a_section_that_config_json_lacks_is_named(tmp_path: Path, value: Any) -> None:
    folder = write_folder(tmp_path, [CHAT], CONFIG | {"llm_config": value})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.section("vision_config") == CONFIG["vision_config"]
    with pytest.raises(CheckpointError, match="config.json: llm_config is missing"):
        checkpoint.section(checkpoint.language_section)


def test_many_missing_tensors_are_counted_not_listed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [CHAT | {f"stray.{i}": torch.zeros(1) for i in range(20)}])
    with pytest.raises(CheckpointError, match="stray.0, .* and 12 more"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/nowhere/at/all", "~/nowhere", "justaname"])
def test_what_is_neither_folder_nor_hub_id_is_refused_without_a_network(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        open_checkpoint(name)


class Hub(BaseHTTPRequestHandler):
    """The three requests of the hub's API that a snapshot download makes, over files in memory."""

    files: dict[str, bytes]
    requested: list[str]
    commit = "a" * 40

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        self.requested.append(self.path)
        body, headers = self.find()
        self.send_response(200 if body is not None else 404)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)

    def find(self) -> tuple[bytes | None, dict[str, str]]:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/tiny/internvl/tree/"):
            return json.dumps([self.entry(name) for name in self.files]).encode(), {}
        if path.startswith("/api/models/tiny/internvl"):
            siblings = [{"rfilename": name} for name in self.files]
            info: dict[str, Any] = {"id": "tiny/internvl", "sha": self.commit, "siblings": siblings}
            return json.dumps(info).encode(), {"Content-Type": "application/json"}
        name = path.removeprefix(f"/tiny/internvl/resolve/{self.commit}/")
        if name not in self.files:
            return None, {"X-Error-Code": "RepoNotFound"}
        etag = hashlib.sha256(self.files[name]).hexdigest()
        return self.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit}

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub on loopback with one repository, and the list of paths that were asked for."""
    folder = write_folder(tmp_path / "repository", [CHAT])
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"tokenizer_config.json": b"{}", "modeling.py": b"raise SystemExit", "old.bin": b"pickled"}
    requested: list[str] = []
    handler = type("TinyHub", (Hub,), {"files": files, "requested": requested})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()


OPEN = """
import sys
from protos.checkpoint import CheckpointError, open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1])
except CheckpointError as error:
    raise SystemExit(f"refused: {error}")
print(checkpoint.folder)
print(*sorted(path.name for path in checkpoint.folder.iterdir()))
"""


def open_in_process(model: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The hub library reads its endpoint and cache from the environment when it is imported."""
    variables = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    proxies = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", OPEN, model],
        env={**os.environ, **variables, **proxies, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_hub_id_is_fetched_once_without_code_and_pickles(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, requested = hub
    fetched = open_in_process("tiny/internvl", tmp_path / "home", HF_ENDPOINT=endpoint)
    assert fetched.returncode == 0, fetched.stderr
    folder, names = fetched.stdout.splitlines()
    assert Path(folder).is_relative_to(tmp_path / "home")
    assert names.split() == ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert not [path for path in requested if path.endswith((".py", ".bin"))]
    offline = open_in_process("tiny/internvl", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline.stdout == fetched.stdout


@pytest.mark.parametrize("reachable", [True, False])
def test_a_hub_id_that_cannot_be_fetched_is_a_clear_error(
    hub: tuple[str, list[str]], tmp_path: Path, reachable: bool
) -> None:
    endpoint = hub[0] if reachable else "http://127.0.0.1:9"
    refused = open_in_process("tiny/absent", tmp_path / "home", HF_ENDPOINT=endpoint)
    assert refused.returncode == 1
    assert "refused: 'tiny/absent' is not a folder here and could not be fetched" in refused.stderr
