"""The benchmarks run and measure what they say; their figures are nobody's test."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.bench import decode, transport
from deploy.bench.raw_socket import RawSocket
from deploy.cli import main
from deploy.random_checkpoint import write_random_checkpoint
from deploy.tiny_checkpoint import TINY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("bench"), TINY)


def test_a_raw_socket_moves_all_that_was_asked_for() -> None:
    with RawSocket(1 << 16) as raw:
        assert raw.bytes_per_second(3) > 0 and raw.bytes_per_second(5) > 0


def test_transport_goes_through_the_real_call(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transport.run(checkpoint, rounds=1, streams_per_round=1)
    assert "ratio" in capsys.readouterr().out


def test_decode_compares_the_same_weights(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decode.run(checkpoint, num_threads=1, dtype="float32", rounds=1)
    printed = capsys.readouterr().out
    assert "transformers generate" in printed and "8 streams / 1 stream" in printed


def test_an_unknown_dtype_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--dtypes", "int3"]) == 2
    assert "--dtypes" in capsys.readouterr().err
