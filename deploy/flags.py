"""Command-line flags derived from (nested) config dataclasses, which own default, help and validation.

Knows dataclasses and argparse; knows nothing about any service.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Flag:
    """One value of a config: `--name` sets the field that `path` leads to."""

    name: str  # without dashes in front: "max-num-seqs"
    path: tuple[str, ...]  # field names from the config down
    type: Any  # as annotated, without the None of an optional
    default: Any  # MISSING: the flag is required
    help: str

    def parse(self, text: str) -> Any:
        """Raises ValueError for a text that is no value of the type."""
        if get_origin(self.type) is tuple:
            element = get_args(self.type)[0]
            return tuple(element(part.strip()) for part in text.split(",") if part.strip())
        return self.type(text)

    def choices(self) -> tuple[str, ...] | None:
        if get_origin(self.type) is Literal:
            return tuple(str(value) for value in get_args(self.type))
        if isinstance(self.type, type) and issubclass(self.type, Enum):
            return tuple(str(member.value) for member in self.type)
        return None

    def spell(self, value: Any) -> str:
        """The argument that gives `value` to another process."""
        if isinstance(value, bool):
            return f"--{self.name}" if value else f"--no-{self.name}"
        return f"--{self.name}={_text(value)}"


class ConfigFlags(Generic[ConfigT]):
    """The flags of one config type.

    A nested dataclass adds its flags as they are, after the prefix in its field's metadata ("prefix").
    Where two names clash, nested ones are prefixed with the name of the field they are nested under.
    """

    def __init__(
        self,
        config_type: type[ConfigT],
        *,
        prefix: str = "",
        omit: Collection[str] = (),
        defaults: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        """`prefix` stands before every name on this parser; `omit` and `defaults` go by flag name."""
        self._config_type = config_type
        self._prefix = prefix
        self._defaults = defaults
        flags = _without_clashes(list(_walk(config_type)))
        unknown = ({*omit, *defaults}) - {flag.name for flag in flags}
        assert not unknown, f"{config_type.__name__} has no {sorted(unknown)}"
        self.flags = tuple(flag for flag in flags if flag.name not in omit)

    def add_to(self, parser: argparse.ArgumentParser, title: str) -> None:
        """Add the flags as a group of the help page.  Flags not given stay out of the namespace."""
        group = parser.add_argument_group(title)
        for flag in self.flags:
            default = self._defaults.get(flag.name, flag.default)
            options: dict[str, Any] = {"dest": self._dest(flag), "default": argparse.SUPPRESS}
            options["help"] = _help(flag.help, default)
            if flag.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["type"] = _converter(flag)
                options["choices"] = flag.choices()
                options["metavar"] = None if options["choices"] else _metavar(flag)
                options["required"] = default is MISSING
            group.add_argument(f"--{self._prefix}{flag.name}", **options)

    def config(self, arguments: argparse.Namespace, **values: Any) -> ConfigT:
        """Build the config; `values` are fields of it that come from elsewhere.

        Raises:
            ValueError: the config refused a value; the message names the flag.
        """
        given = {flag.path: value for flag, value in self._given(arguments, with_defaults=True)}
        given |= {(name,): value for name, value in values.items()}
        as_typed = tuple(dataclasses.replace(flag, name=self._prefix + flag.name) for flag in self.flags)
        config: ConfigT = _build(self._config_type, None, (), given, as_typed)
        return config

    def command_line(self, arguments: argparse.Namespace) -> list[str]:
        """The flags that were given, as arguments of a process that has them without `prefix`."""
        return [flag.spell(value) for flag, value in self._given(arguments, with_defaults=False)]

    def _given(self, arguments: argparse.Namespace, with_defaults: bool) -> Iterator[tuple[Flag, Any]]:
        for flag in self.flags:
            if hasattr(arguments, self._dest(flag)):
                yield flag, getattr(arguments, self._dest(flag))
            elif with_defaults and flag.name in self._defaults:
                yield flag, self._defaults[flag.name]

    def _dest(self, flag: Flag) -> str:
        return (self._prefix + flag.name).replace("-", "_")


def _walk(config_type: Any, path: tuple[str, ...] = (), prefix: str = "") -> Iterator[Flag]:
    hints = get_type_hints(config_type)
    for entry in dataclasses.fields(config_type):
        if not entry.init:
            continue
        kind = _without_none(hints[entry.name])
        here = (*path, entry.name)
        if dataclasses.is_dataclass(kind):
            base = _default_of(entry)
            nested = _walk(kind, here, prefix + entry.metadata.get("prefix", ""))
            yield from (_with_default(flag, base, len(here)) for flag in nested)
        else:
            name = prefix + entry.name.replace("_", "-")
            yield Flag(name, here, kind, _default_of(entry), entry.metadata.get("help", ""))


def _with_default(flag: Flag, base: Any, depth: int) -> Flag:
    """The value that the outer config's default instance has wins over the inner type's own default."""
    if base is MISSING or base is None:
        return flag
    value = base
    for name in flag.path[depth:]:
        value = getattr(value, name)
    return dataclasses.replace(flag, default=value)


def _without_clashes(flags: list[Flag]) -> list[Flag]:
    count = Counter(flag.name for flag in flags)
    return [
        dataclasses.replace(flag, name=f"{flag.path[-2].replace('_', '-')}-{flag.name}")
        if count[flag.name] > 1 and len(flag.path) > 1
        else flag
        for flag in flags
    ]


def _build(
    config_type: Any,
    base: Any,
    path: tuple[str, ...],
    given: Mapping[tuple[str, ...], Any],
    flags: tuple[Flag, ...],
) -> Any:
    """An instance of `config_type`: `base` (or the defaults) with what was given below `path`."""
    values: dict[str, Any] = {}
    hints = get_type_hints(config_type)
    for entry in dataclasses.fields(config_type):
        here = (*path, entry.name)
        kind = _without_none(hints[entry.name])
        if here in given:
            values[entry.name] = given[here]
        elif dataclasses.is_dataclass(kind) and any(key[: len(here)] == here for key in given):
            inner = getattr(base, entry.name) if base is not None else _default_of(entry)
            values[entry.name] = _build(kind, None if inner is MISSING else inner, here, given, flags)
    try:
        return config_type(**values) if base is None else dataclasses.replace(base, **values)
    except ValueError as error:
        raise ValueError(_name_flags(str(error), path, flags)) from error


def _name_flags(message: str, path: tuple[str, ...], flags: tuple[Flag, ...]) -> str:
    """Fields in a config's message spelled as flags: those with an underscore, and the first word."""
    for flag in flags:
        if flag.path[:-1] == path:
            name = flag.path[-1]
            pattern = rf"\b{name}\b" if "_" in name else rf"^{name}\b"
            message = re.sub(pattern, f"--{flag.name}", message)
    return message


def _default_of(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def _without_none(kind: Any) -> Any:
    """`int` of `int | None`; other unions have no flag."""
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = [part for part in get_args(kind) if part is not type(None)]
        return inner
    return kind


def _converter(flag: Flag) -> Callable[[str], Any]:
    """`flag.parse` under the name that argparse's message "invalid NAME value" shows."""
    if get_origin(flag.type) is Literal:
        return str

    def convert(text: str) -> Any:
        return flag.parse(text)

    convert.__name__ = getattr(flag.type, "__name__", "list")
    return convert


def _metavar(flag: Flag) -> str:
    if get_origin(flag.type) is tuple:
        return f"{get_args(flag.type)[0].__name__.upper()},..."
    return str(flag.type.__name__).upper()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(part) for part in value)
    return str(value.value) if isinstance(value, Enum) else str(value)


def _help(text: str, default: Any) -> str:
    text = text.replace("%", "%%")
    if default is MISSING:
        return f"{text} (required)"
    if default is None or default in ("", ()):
        return text
    return f"{text} (default: {_text(default).replace('%', '%%')})"
