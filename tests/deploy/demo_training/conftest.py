"""What the tests of the training share: a fresh checkpoint folder, and fonts that every machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.demo_training.checkpoint_files import demo_shape, write_configs
from deploy.demo_training.conversation import Encoder
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.train import make_encoder
from deploy.demo_training.vocabulary import make_tokenizer
from llm_service.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def fonts() -> FontShelf:
    """The held-out ones, of which Pillow's own is everywhere."""
    return FontShelf.find("held_out")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of the demo model, no weights."""
    folder = tmp_path_factory.mktemp("fresh")
    tokenizer = make_tokenizer(["color", "many", "the"])
    write_configs(folder, tokenizer, demo_shape(tokenizer.get_vocab_size()))
    return folder


@pytest.fixture(scope="session")
def encoder(fresh: Path) -> Encoder:
    return make_encoder(fresh)


@pytest.fixture(scope="session")
def tokenizer(fresh: Path) -> Tokenizer:
    return load_tokenizer(fresh)
