"""A checkpoint folder or hub id as named tensors on disk; both services read their half through it.

Knows the two InternVL formats and safetensors' layout; knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What a serving node needs of a repository; pickled weights (*.bin, *.pt) and code (*.py) are never fetched.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit

VISION_PREFIXES = (
    "vision_model.",
    "mlp1.",
    "model.vision_tower.",
    "vision_tower.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
)
LANGUAGE_PREFIXES = ("language_model.", "model.language_model.", "lm_head.")


class CheckpointError(ValueError):
    """The checkpoint cannot be served; the message names the file, key or tensor at fault."""


class CheckpointFormat(StrEnum):
    """Value of `architectures[0]` in config.json."""

    CHAT = "InternVLChatModel"
    HF = "InternVLForConditionalGeneration"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, end) of `file`, in safetensors' dtype spelling ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: Mapping[str, Any]
    format: CheckpointFormat
    tensors: Mapping[str, TensorEntry]

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None when there is none."""
        path = self.folder / filename
        return _read_json(path) if path.is_file() else None

    def section(self, name: str) -> Mapping[str, Any]:
        """A part of config.json ("vision_config").  Raises CheckpointError where there is none."""
        section = self.config.get(name)
        if not isinstance(section, dict):
            raise CheckpointError(f"{self.folder}/config.json: {name} is missing")
        return section

    @property
    def language_section(self) -> str:
        """Name of the decoder's part of config.json."""
        return "llm_config" if self.format is CheckpointFormat.CHAT else "text_config"

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) on the CPU in the stored dtype, one at a time, file by file."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, names_here in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in names_here:
                    yield name, opened.get_tensor(name)

    def vision_names(self) -> list[str]:
        """Names of the tower's and projector's tensors, sorted."""
        return self._names_under(VISION_PREFIXES)

    def language_names(self) -> list[str]:
        """Names of the decoder's and lm_head's tensors, sorted."""
        return self._names_under(LANGUAGE_PREFIXES)

    def _names_under(self, prefixes: tuple[str, ...]) -> list[str]:
        return sorted(name for name in self.tensors if name.startswith(prefixes))


def open_checkpoint(model: str) -> Checkpoint:
    """Open a local folder, or fetch a hub id first (with the hub library's progress bar).

    Raises:
        CheckpointError: no such folder or repository, an unknown format, tensors of neither half.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(model)
    config = _read_json(folder / "config.json")
    tensors = _index_tensors(folder)
    _refuse_strays(folder, tensors)
    return Checkpoint(folder, config, _format_of(folder, config), tensors)


def _shards_of(index: Path) -> dict[str, str]:
    """Shard of each tensor.  Only names are checked: a hub's snapshot is symlinks that leave the folder."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is not a JSON object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map: {name} lies in {shard!r}, not in a file beside it")
    return weight_map


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model!r} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is not a folder here and could not be fetched from the hub ({type(error).__name__})"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _format_of(folder: Path, config: Mapping[str, Any]) -> CheckpointFormat:
    architecture = next(iter(config.get("architectures") or [None]))
    try:
        return CheckpointFormat(architecture)
    except ValueError:
        supported = ", ".join(CheckpointFormat)
        raise CheckpointError(
            f"{folder}/config.json: architectures is {architecture!r}; supported: {supported}"
        ) from None


def _index_tensors(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of the index's shards, or of every safetensors file where there is no index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        return {name: entry for file in files for name, entry in _read_header(file).items()}
    weight_map = _shards_of(index)
    headers = {shard: _read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    missing = sorted(name for name, shard in weight_map.items() if name not in headers[shard])
    if missing:
        raise CheckpointError(f"{index}: names tensors that its shards lack: {listing(missing)}")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Header of a safetensors file: 8 bytes little-endian length, then JSON; offsets count from its end."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: not a safetensors file")
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not a safetensors file") from error
    base = 8 + length
    return {
        name: TensorEntry(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            base + entry["data_offsets"][0],
            base + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _refuse_strays(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    known = VISION_PREFIXES + LANGUAGE_PREFIXES
    strays = sorted(name for name in tensors if not name.startswith(known))
    if strays:
        raise CheckpointError(f"{folder}: unused tensors (of neither half): {listing(strays)}")


def listing(names: list[str], shown: int = 8) -> str:
    """The first of the names, and how many more there are: for messages."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
