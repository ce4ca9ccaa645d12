"""Which of several replicas gets a piece of work: rendezvous hashing with bounded load.

Pure: who knows the same replicas and about the same loads chooses the same one, without talking to anybody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

# Bounded load (Mirrokni, Thorup, Zadimoghaddam 2016): a replica may hold this multiple of the mean.
MAX_LOAD_RATIO = 1.25


def choose(
    key: bytes,
    loads: Mapping[str, float],
    weight: float = 1,
    *,
    free: float = 0,
    max_load_ratio: float = MAX_LOAD_RATIO,
) -> str:
    """The first replica in the key's order whose load is at most `max_load_ratio` times the mean.

    Args:
        key: what the work is about; equal keys go to the same replica while its load allows.
        loads: work that each replica has, in the unit of `weight`.
        weight: of the new work; the mean is taken with it.
        free: a load up to which a replica is not busy, whatever the mean is.
    """
    limit = max(free, max_load_ratio * (sum(loads.values()) + weight) / len(loads))
    # There is one: the least busy has at most the mean.
    return next(name for name in rendezvous_order(key, loads) if loads[name] <= limit)


def rendezvous_order(key: bytes, names: Iterable[str]) -> list[str]:
    """Highest random weight first (Thaler and Ravishankar 1998): a name more or less moves only its share."""
    return sorted(names, key=lambda name: hashlib.sha256(key + name.encode()).digest(), reverse=True)


class Load:
    """What one replica has to do: our own work as of now, that of others as of its last report."""

    def __init__(self) -> None:
        self.own = 0
        self._others = 0

    def report(self, total: int) -> None:
        """The replica says that it has this much, ours included."""
        self._others = max(0, total - self.own)

    @property
    def total(self) -> int:
        return self.own + self._others
