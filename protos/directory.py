"""The addresses behind a list of targets: `host:port` as it is, `dns:///name:port` as it resolves now.

Knows nothing about connections; whoever holds them is told when the addresses change.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

RESOLVE_INTERVAL_S = 5.0
# Between two look-ups of a name, however many connections fail meanwhile.
MIN_RESOLVE_INTERVAL_S = 0.5
_PREFIX = "dns:"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    address: str  # for a channel
    server_name: str = ""  # that its certificate must have; empty: the address's own


@dataclass(frozen=True)
class Name:
    host: str
    port: int


Lookup = Callable[[str, int], Awaitable[list[str]]]


async def look_up(host: str, port: int) -> list[str]:
    """All A and AAAA records as `address:port`.  Raises OSError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label is empty or too long
        raise OSError("no name of a host") from error
    return [
        f"[{address[0]}]:{port}" if ":" in str(address[0]) else f"{address[0]}:{port}"
        for *_, address in found
    ]


class Directory:
    """Names are looked up every few seconds; one that cannot be keeps the addresses it had."""

    def __init__(
        self,
        targets: Sequence[str],
        on_change: Callable[[list[Replica]], None],
        lookup: Lookup = look_up,
    ) -> None:
        """`on_change` gets all replicas whenever they are others than before.  Raises as `parse_target`."""
        self._on_change = on_change
        self._lookup = lookup
        names = {target: parse_target(target) for target in targets}
        self._names = {target: name for target, name in names.items() if name is not None}
        self._found = {target: [Replica(target)] if name is None else [] for target, name in names.items()}
        self._resolving: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._hurried = asyncio.Event()

    @property
    def replicas(self) -> list[Replica]:
        """In the order of the targets; an address that two of them have counts once."""
        found = (replica for replicas in self._found.values() for replica in replicas)
        return list({replica.address: replica for replica in found}.values())

    def start(self) -> None:
        if self._names:
            self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        tasks = [task for task in (self._following, self._resolving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def hurry(self) -> None:
        """A replica failed: others may have taken its place."""
        self._hurried.set()

    async def resolve(self, timeout_s: float) -> None:
        """Look all names up once, or wait for the look-up under way, but not longer than this."""
        if not self._names:
            return
        if self._resolving is None or self._resolving.done():
            self._resolving = asyncio.create_task(self._resolve())
        await asyncio.wait([self._resolving], timeout=timeout_s)

    async def _follow(self) -> None:
        while True:
            await self.resolve(RESOLVE_INTERVAL_S)
            await asyncio.sleep(MIN_RESOLVE_INTERVAL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(RESOLVE_INTERVAL_S):
                    await self._hurried.wait()
            self._hurried.clear()

    async def _resolve(self) -> None:
        await asyncio.gather(*(self._resolve_name(target, name) for target, name in self._names.items()))

    async def _resolve_name(self, target: str, name: Name) -> None:
        try:
            addresses = await self._lookup(name.host, name.port)
        except OSError as error:
            log.warning("%s cannot be resolved: %s", target, error)
            return
        found = [Replica(address, name.host) for address in sorted(set(addresses))]
        if found and found != self._found[target]:
            log.info("%s is %s", target, ", ".join(replica.address for replica in found))
            self._found[target] = found
            self._on_change(self.replicas)


def parse_target(target: str) -> Name | None:
    """The name in `dns:///name:port` or `dns:name:port`, as gRPC reads them; None for any other target.

    Raises:
        ValueError: a `dns:` target without a name or a port, or with a name server of its own.
    """
    if not target.startswith(_PREFIX):
        return None
    host, _, port = target.removeprefix(_PREFIX).removeprefix("///").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"{target!r} is not like dns:///NAME:PORT")
    return Name(host.strip("[]"), int(port))
