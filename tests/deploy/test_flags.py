"""Flags derived from dataclasses: every supported type, nesting, errors that name the flag."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import pytest

from deploy.flags import ConfigFlags
from protos.channel import ClientTlsConfig
from protos.server import ServerConfig


class Speed(StrEnum):
    SLOW = "slow"
    FAST = "fast"


@dataclass(frozen=True)
class KitchenConfig:
    max_num_pans: int = field(default=4, metadata={"help": "pans in use at once, 100% at most"})
    heat: float = field(default=0.5, metadata={"help": "fraction of full heat"})

    def __post_init__(self) -> None:
        if self.max_num_pans < 1:
            raise ValueError(f"max_num_pans must be >= 1, got {self.max_num_pans}")
        if not 0 <= self.heat <= 1:
            raise ValueError(f"heat must be 0..1, got {self.heat}")


@dataclass(frozen=True)
class CafeConfig:
    model: str = field(metadata={"help": "what is served"})
    server: ServerConfig = field(default_factory=lambda: ServerConfig(port=7000))
    kitchen: KitchenConfig = field(default_factory=KitchenConfig)
    supplier_tls: ClientTlsConfig = field(
        default_factory=ClientTlsConfig, metadata={"prefix": "supplier-tls-"}
    )
    suppliers: tuple[str, ...] = field(default=("farm:1",), metadata={"help": "addresses"})
    shelf_lengths: tuple[int, ...] = ()
    music: bool = field(default=True, metadata={"help": "play music"})
    tables: int | None = field(default=None, metadata={"help": "all of them when not given"})
    name: str | None = None
    dtype: Literal["auto", "float32"] = field(default="auto", metadata={"help": "arithmetic"})
    speed: Speed = Speed.SLOW


def parse(
    *arguments: str, flags: ConfigFlags[CafeConfig] | None = None
) -> tuple[argparse.Namespace, ConfigFlags[CafeConfig]]:
    flags = flags or ConfigFlags(CafeConfig, omit=("model",))
    parser = argparse.ArgumentParser(prog="cafe", allow_abbrev=False)
    flags.add_to(parser, "cafe")
    return parser.parse_args(arguments), flags


def config(*arguments: str) -> CafeConfig:
    namespace, flags = parse(*arguments)
    return flags.config(namespace, model="soup")


def test_no_flags_give_the_defaults_of_the_dataclass() -> None:
    assert config() == CafeConfig("soup")


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--max-num-pans", "9"], "kitchen.max_num_pans", 9),
        (["--heat", "0.25"], "kitchen.heat", 0.25),
        (["--metrics-port", "-1"], "server.metrics_port", -1),
        (["--tls-cert=c", "--tls-key=k"], "server.tls_cert", "c"),
        (["--no-reflection"], "server.reflection", False),
        (["--supplier-tls-ca", "ca.pem"], "supplier_tls.ca", "ca.pem"),
        (["--suppliers", "a:1, b:2,"], "suppliers", ("a:1", "b:2")),
        (["--shelf-lengths", "3,4"], "shelf_lengths", (3, 4)),
        (["--no-music"], "music", False),
        (["--tables", "3"], "tables", 3),
        (["--name", "Tess"], "name", "Tess"),
        (["--dtype", "float32"], "dtype", "float32"),
        (["--speed", "fast"], "speed", Speed.FAST),
    ],
)
def test_a_flag_sets_its_field(arguments: list[str], path: str, value: Any) -> None:
    found: Any = config(*arguments)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_nested_flag_keeps_the_outer_default_of_its_neighbours() -> None:
    assert config("--host", "::1").server == ServerConfig(host="::1", port=7000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-pan", "3"], "unrecognized arguments: --max-num-pan"),
        (["--max-num-pans", "three"], "argument --max-num-pans: invalid int value: 'three'"),
        (["--heat", "hot"], "argument --heat: invalid float value: 'hot'"),
        (["--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["--speed", "warp"], "argument --speed: invalid"),
        (["--shelf-lengths", "3,x"], "argument --shelf-lengths: invalid"),
        (["--tables"], "argument --tables: expected one argument"),
    ],
)
def test_a_wrong_argument_is_an_error_naming_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-pans", "0"], "--max-num-pans must be >= 1, got 0"),
        (["--heat", "2"], "--heat must be 0..1, got 2.0"),
        (["--port", "70000"], "--port must be 0..65535, got 70000"),
        (["--tls-cert", "c"], "--tls-cert and --tls-key go together"),
    ],
)
def test_a_value_that_the_config_refuses_is_an_error_naming_the_flag(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        config(*arguments)
    assert str(refused.value) == message


def test_a_flag_without_a_default_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(flags=ConfigFlags(CafeConfig))
    assert "required: --model" in capsys.readouterr().err


def test_help_shows_defaults_and_percent_signs() -> None:
    parser = argparse.ArgumentParser()
    ConfigFlags(CafeConfig, omit=("model",), defaults={"metrics-port": 9}).add_to(parser, "cafe")
    page = " ".join(parser.format_help().split())
    for expected in (
        "pans in use at once, 100% at most (default: 4)",
        "--music, --no-music",
        "(default: farm:1)",
        "--dtype {auto,float32}",
        "listen on; 0 takes a free one (default: 7000)",
        "switches it off (default: 9)",
    ):
        assert expected in page


def test_own_defaults_apply_where_the_flag_is_not_given() -> None:
    flags = ConfigFlags(CafeConfig, omit=("model",), defaults={"port": 80, "music": False})
    namespace, _ = parse("--music", flags=flags)
    built = flags.config(namespace, model="soup")
    assert (built.server.port, built.music) == (80, True)


def test_a_prefixed_command_line_is_handed_on_without_the_prefix() -> None:
    flags = ConfigFlags(CafeConfig, prefix="cafe-", omit=("model",))
    given = ["--cafe-port=1", "--no-cafe-music", "--cafe-suppliers=a:1,b:2", "--cafe-speed=fast"]
    namespace, _ = parse(*given, flags=flags)
    handed_on = flags.command_line(namespace)
    assert sorted(handed_on) == sorted(["--port=1", "--no-music", "--suppliers=a:1,b:2", "--speed=fast"])
    assert config(*handed_on) == flags.config(namespace, model="soup")


def test_nested_flags_of_one_name_are_prefixed_with_their_field() -> None:
    @dataclass(frozen=True)
    class Inner:
        size: int = 1

    @dataclass(frozen=True)
    class Outer:
        left_arm: Inner = Inner()
        right_arm: Inner = Inner(2)

    Outer.__annotations__ = {"left_arm": Inner, "right_arm": Inner}
    parser = argparse.ArgumentParser()
    flags = ConfigFlags(Outer)
    flags.add_to(parser, "outer")
    assert flags.config(parser.parse_args(["--right-arm-size", "5"])) == Outer(Inner(1), Inner(5))


def test_omitting_a_flag_that_does_not_exist_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="no \\['modle'\\]"):
        ConfigFlags(CafeConfig, omit=("modle",))
