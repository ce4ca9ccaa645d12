"""The embedded default until there is a demo model: a tiny random checkpoint, made on first use."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from deploy import random_checkpoint
from deploy.random_checkpoint import TOKENIZER_SIZE, CheckpointShape, write_random_checkpoint

NOISE_NOTICE = "tiny random checkpoint: answers are noise until the demo model arrives"

TINY = CheckpointShape(
    image_size=224,  # 64 visual tokens a tile
    vision_hidden=64,
    vision_intermediate=128,
    vision_layers=2,
    vision_heads=4,
    hidden=96,
    intermediate=192,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab_size=TOKENIZER_SIZE,
)


def default_checkpoint(cache: Path | None = None) -> Path:
    """The embedded checkpoint's folder: made on first use, then found in the user's cache.

    The folder's name holds the hash of the code, so a newer Tessera never meets an older checkpoint.
    """
    code = Path(__file__).read_bytes() + Path(random_checkpoint.__file__).read_bytes()
    digest = hashlib.sha256(code).hexdigest()[:12]
    folder = (cache or user_cache()) / f"tiny-random-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
    write_random_checkpoint(made, TINY)
    try:
        made.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(made)
    return folder


def user_cache() -> Path:
    """Where this user's programs keep what can be made again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"
