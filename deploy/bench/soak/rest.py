"""What the services hold while nobody asks anything."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

from deploy.bench.soak.gauges import Gauges, Levels
from deploy.bench.soak.processes import Usage, usages

POLL_S = 0.1
# What clients have left behind ends well within this.
IDLE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Rest:
    """Taken when the levels were those of before, or when they did not get there in time."""

    at_s: float
    num_actions: int  # until now
    usages: dict[str, Usage]
    levels: Levels
    strays: Levels  # levels that are not those of before


async def take_rest(gauges: Gauges, before: Levels | None, num_actions: int) -> Rest:
    """Wait until every gauge is back at its level; of the first rest, until two readings are equal."""
    give_up_at = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        levels = await gauges.read()
        strays = {name: value for name, value in levels.items() if value != (before or {}).get(name)}
        if not strays or time.monotonic() > give_up_at:
            return Rest(time.monotonic(), num_actions, usages(os.getpid()), levels, strays if before else {})
        before = before if before is not None else levels
        await asyncio.sleep(POLL_S)
