"""Connections to the replicas behind a list of targets, which come and go: those that leave may finish.

Knows what a connection is called and how it starts and ends, and nothing else about it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from protos.directory import Directory, Lookup, Replica

# How long a request waits for a name to be resolved when nobody is known.
RESOLVE_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class Connection(Protocol):
    def start(self) -> None:
        """Notice by itself from now on how the replica is."""

    async def close(self) -> None: ...

    async def close_when_idle(self) -> None:
        """`close`, when what has begun has ended; at once when cancelled."""


C = TypeVar("C", bound=Connection)


class Replicas(Generic[C]):
    """Make it inside a running event loop."""

    def __init__(
        self, kind: str, targets: Sequence[str], connect: Callable[[Replica], C], lookup: Lookup
    ) -> None:
        """`kind` is what the log calls a replica; `lookup` resolves names.  Raises as `Directory`."""
        self.connections: dict[str, C] = {}  # by address, in the order of the targets
        self.leaving: set[asyncio.Task[None]] = set()
        self._kind = kind
        self._connect = connect
        self._is_started = False
        self._directory = Directory(targets, self._follow, lookup)
        self._follow(self._directory.replicas)

    def start(self) -> None:
        """Follow the names and let the connections notice how their replicas are."""
        self._is_started = True
        self._directory.start()
        for connection in self.connections.values():
            connection.start()

    async def close(self) -> None:
        await self._directory.close()
        for leaving in self.leaving:
            leaving.cancel()
        await asyncio.gather(*self.leaving, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in self.connections.values()))

    def hurry(self) -> None:
        """A replica failed: its name may have other addresses by now."""
        self._directory.hurry()

    async def resolve(self, timeout_s: float = RESOLVE_TIMEOUT_S) -> None:
        """Look all names up once, but wait no longer than this."""
        await self._directory.resolve(timeout_s)

    def _follow(self, replicas: Sequence[Replica]) -> None:
        """Connect to those that are new; leave those that are gone to what they have begun."""
        known, self.connections = self.connections, {}
        for replica in replicas:
            address = replica.address
            self.connections[address] = known.pop(address) if address in known else self._join(replica)
        for address, connection in known.items():
            log.info("%s %s has left", self._kind, address)
            leaving = asyncio.create_task(connection.close_when_idle())
            self.leaving.add(leaving)
            leaving.add_done_callback(self.leaving.discard)

    def _join(self, replica: Replica) -> C:
        connection = self._connect(replica)
        if self._is_started:
            connection.start()
        return connection
