"""The model that is served where none is given: Tessera's own demo model, shipped in this package."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.random_checkpoint import INDEX
from protos.checkpoint import CheckpointError

EMBEDDED_MODEL_NAME = "tessera-demo"
EMBEDDED_MODEL_NOTE = (
    f"{EMBEDDED_MODEL_NAME} is a demo model of 16 million parameters: it reads short texts and knows shapes, "
    "colours, counts and places"
)
REMEDY = "check the repository out in full, or name a MODEL"
FOLDER = Path(__file__).parent / "demo_model"


def embedded_checkpoint(folder: Path = FOLDER) -> Path:
    """The checkpoint's folder.

    Raises:
        CheckpointError: weights are missing or cut, as after a partial checkout or behind Git LFS pointers.
    """
    expected, present = _sizes(folder)
    if present < expected:
        raise CheckpointError(
            f"{folder} holds {present} of the {expected} bytes of the demo model's weights: {REMEDY}"
        )
    return folder


def _sizes(folder: Path) -> tuple[int, int]:
    """Bytes of weights that the index names, and bytes of the files that it names."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the demo model's {folder / INDEX} cannot be read: {REMEDY}") from error
    files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    return index["metadata"]["total_size"], sum(file.stat().st_size for file in files if file.is_file())
