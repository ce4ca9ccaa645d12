"""The choice of an attention backend."""

import logging

import pytest
import torch

from llm_service.attention.base import select_backend

CPU = torch.device("cpu")


def test_the_choice_and_its_reason_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        backend = select_backend("auto", CPU)
    assert backend.name == "sdpa" and backend.block_size == 16
    assert "sdpa" in caplog.text and "cpu" in caplog.text


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="'flash3'.*auto, sdpa"):
        select_backend("flash3", CPU)
