"""Who may write and who reads the slots of the visual-token store: bookkeeping only, no tensors.

The store is one shared-memory segment of equal slots, one tile each, owned by the engine.  A slot is FREE,
GRANTED (a front end may write it, nobody else), or STORED (readable by every rank).  Stored tiles stay until
their groups have ended, and after that as a cache until a slot is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_service.sequence import TileKey


@dataclass
class StoreEntry:
    slot: int
    owner: int | None  # group whose front end may write the slot, ended or not; None once it is stored
    users: set[int] = field(default_factory=set)  # groups whose prompts contain the tile

    @property
    def is_stored(self) -> bool:
        return self.owner is None

    @property
    def is_in_use(self) -> bool:
        """Else it is a cache."""
        return self.owner is not None or bool(self.users)


class VisualStore:
    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be >= 1, got {num_slots}")
        self.num_slots = num_slots
        self.num_hits = 0  # tiles that a group found here, stored or on their way
        self.num_grants = 0  # tiles that had to be fetched
        self.num_in_use = 0  # slots that are granted or that a living group needs
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._entries: OrderedDict[TileKey, StoreEntry] = OrderedDict()  # least recently used first

    def slot_of(self, key: TileKey) -> int | None:
        """Slot of a stored tile; None while it is missing or only granted."""
        entry = self._entries.get(key)
        return entry.slot if entry is not None and entry.is_stored else None

    def is_granted(self, key: TileKey) -> bool:
        """Whether a front end is fetching the tile."""
        entry = self._entries.get(key)
        return entry is not None and not entry.is_stored

    def join(self, key: TileKey, group_id: int) -> bool:
        """Count the group as a user of the tile if the store has it or somebody is fetching it."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self.num_hits += group_id not in entry.users
        self.num_in_use += not entry.is_in_use
        entry.users.add(group_id)
        self._entries.move_to_end(key)
        return True

    def grant(self, key: TileKey, group_id: int) -> int | None:
        """A slot that the group's front end may write now; None if no slot is free."""
        assert key not in self._entries
        if not self._free_slots and not self._evict_unused():
            return None
        slot = self._free_slots.pop()
        self.num_grants += 1
        self.num_in_use += 1
        self._entries[key] = StoreEntry(slot, owner=group_id, users={group_id})
        return slot

    def store(self, key: TileKey, group_id: int) -> None:
        """The front end has written the slot."""
        entry = self._entries.get(key)
        assert entry is not None and entry.owner == group_id, "tile stored without a grant"
        entry.owner = None
        self.num_in_use -= not entry.is_in_use

    def evict_least_needed(self, penalty: Callable[[TileKey], tuple[float, int] | None]) -> bool:
        """Free the stored tile with the highest penalty; entries with None are not to be touched."""
        candidates = [
            (score, key)
            for key, entry in self._entries.items()
            if entry.is_stored and (score := penalty(key)) is not None
        ]
        if not candidates:
            return False
        _, key = max(candidates, key=lambda candidate: candidate[0])
        self._remove(key)
        return True

    def leave(self, group_id: int) -> None:
        """The group has ended and its tiles become cache.

        Its grants stay until `revoke`: a slot that its front end may still be writing is nobody else's.
        """
        for entry in self._entries.values():
            was_in_use = entry.is_in_use
            entry.users.discard(group_id)
            self.num_in_use -= was_in_use and not entry.is_in_use

    def revoke(self, group_id: int) -> None:
        """The group's front end will write no slot any more: its grants are void."""
        for key in [key for key, entry in self._entries.items() if entry.owner == group_id]:
            self._remove(key)

    def check(self, group_ids: set[int]) -> None:
        """Assert that every slot is owned once and only living groups are named."""
        used = [entry.slot for entry in self._entries.values()]
        assert sorted(used + self._free_slots) == list(range(self.num_slots)), "slot lost or owned twice"
        for entry in self._entries.values():
            assert entry.users <= group_ids, "tile used by a group that has ended"
        assert self.num_in_use == sum(entry.is_in_use for entry in self._entries.values())

    def _evict_unused(self) -> bool:
        key = next((key for key, entry in self._entries.items() if entry.is_stored and not entry.users), None)
        if key is None:
            return False
        self._remove(key)
        return True

    def _remove(self, key: TileKey) -> None:
        entry = self._entries.pop(key)
        self.num_in_use -= entry.is_in_use
        self._free_slots.append(entry.slot)
