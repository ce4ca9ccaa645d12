"""A number of clients that changes with time, each with a seeded mix of actions, and what they saw."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.bench.soak.actions import Action
from deploy.bench.soak.asker import Asker

MIN_CLIENTS, MAX_CLIENTS = 8, 64
SIZES_PER_ROUND = 3
ACTION_TIMEOUT_S = 120.0
MAX_KEPT = 50  # failures; the rest is counted, and no further round is begun


@dataclass
class Tally:
    """Of all rounds."""

    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # the longest of each action
    failures: list[str] = field(default_factory=list)
    num_failures: int = 0

    def note(self, action: str, seconds: float) -> None:
        self.counts[action] = self.counts.get(action, 0) + 1
        self.seconds[action] = max(self.seconds.get(action, 0.0), seconds)

    def fail(self, text: str) -> None:
        self.num_failures += 1
        if len(self.failures) < MAX_KEPT:
            self.failures.append(text)
            print(f"unexpected: {text}", file=sys.stderr, flush=True)

    @property
    def num_actions(self) -> int:
        return sum(self.counts.values())


class Crowd:
    """One round after the other, never two at a time."""

    def __init__(self, asker: Asker, actions: Sequence[Action], seed: int, tally: Tally) -> None:
        self._asker = asker
        self._actions = actions
        self._weights = [action.weight for action in actions]
        self._seed = seed
        self._tally = tally
        self._num_rounds = 0
        self._size = 0
        self._resized = asyncio.Event()

    async def run_round(self, seconds: float) -> None:
        """Returns when every client has ended what it was about."""
        self._num_rounds += 1
        ends_at = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(MAX_CLIENTS):
                group.create_task(self._client(number, ends_at))
            group.create_task(self._resize(seconds))

    async def _resize(self, seconds: float) -> None:
        rng = random.Random(f"{self._seed} {self._num_rounds}")
        for _ in range(SIZES_PER_ROUND):
            self._size = rng.randint(MIN_CLIENTS, MAX_CLIENTS)
            self._wake()
            await asyncio.sleep(seconds / SIZES_PER_ROUND)
        self._size = MAX_CLIENTS  # those that wait see that the round is over
        self._wake()

    def _wake(self) -> None:
        self._resized.set()
        self._resized = asyncio.Event()

    async def _client(self, number: int, ends_at: float) -> None:
        rng = random.Random(f"{self._seed} {self._num_rounds} {number}")
        while time.monotonic() < ends_at:
            if number >= self._size:
                await self._resized.wait()
            else:
                await self._act(rng.choices(self._actions, self._weights)[0], rng)

    async def _act(self, action: Action, rng: random.Random) -> None:
        start = time.monotonic()
        try:
            async with asyncio.timeout(ACTION_TIMEOUT_S):
                await action.act(self._asker, rng)
        except TimeoutError:
            self._tally.fail(f"{action.name}: not over within {ACTION_TIMEOUT_S:.0f} s")
        except Exception as error:  # whatever came or did not come: it is not what was asked for
            self._tally.fail(f"{action.name}: {type(error).__name__}: {error}")
        self._tally.note(action.name, time.monotonic() - start)
