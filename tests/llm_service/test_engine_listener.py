"""The socket appears when it accepts, complete, and takes nobody's place."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from llm_service.engine_listener import EngineListener


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))


def test_it_is_found_once_it_is_published_and_refuses_once_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    listener = EngineListener(path)
    assert not path.exists()
    listener.publish()
    connect(path)
    assert list(tmp_path.iterdir()) == [path] and stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        connect(path)


def test_the_second_of_two_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    first, second = EngineListener(path), EngineListener(path)
    first.publish()
    with pytest.raises(ValueError, match=f"engine_socket {path}: another engine listens there"):
        second.publish()
    second.close()
    connect(path)
    assert list(tmp_path.iterdir()) == [path]
    first.close()


def test_one_that_is_closed_before_it_was_published_leaves_nothing(tmp_path: Path) -> None:
    EngineListener(tmp_path / "engine.sock").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 108, "nowhere/engine.sock"])
def test_a_path_where_none_can_be_is_named_with_its_setting(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"engine_socket .*{name}: "):
        EngineListener(tmp_path / name)
