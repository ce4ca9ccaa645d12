"""Checkpoints, references and loaded pairs, each made once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.parity.local_pair import LocalPair
from tests.parity.reference import Reference

# Tower and seed; with these seeds no greedy path of the tests has a near-tie (reference.MIN_TOP2_GAP).
CHECKPOINTS = {"qwen2": ("300m", 4), "qwen3": ("6b", 12), "llama": ("300m", 5)}
CASES = (
    ("qwen2", "hf"),
    ("qwen3", "hf"),
    ("llama", "hf"),
    ("qwen2", "chat"),
    ("qwen3", "chat"),
    ("llama", "chat"),
    ("internlm2", "chat"),
)


@dataclass(frozen=True)
class Model:
    """One family in one format."""

    family: str
    format: str
    folder: Path
    hf_folder: Path

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.family, self.format, self.folder, self.hf_folder)

    @cached_property
    def pair(self) -> LocalPair:
        return LocalPair(self.folder)


Models = Callable[[str, str], Model]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being shared among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def checkpoint(family: str, format: str) -> Path:
        # InternLM2 is a packed Llama, which is what transformers has of it.
        vision, seed = CHECKPOINTS["llama" if family == "internlm2" else family]
        return make_checkpoint(root / f"{family}-{format}", family, format, vision=vision, seed=seed)

    @cache
    def model(family: str, format: str) -> Model:
        reference = "llama" if family == "internlm2" else family
        return Model(family, format, checkpoint(family, format), checkpoint(reference, "hf"))

    return model


@pytest.fixture(scope="session", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest, models: Models) -> Model:
    return models(*request.param)
