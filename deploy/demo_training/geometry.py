"""Where objects are and how they stand to each other, answered only where people would agree."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.demo_training.scenes import Scene, Thing

COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")
# Shares of a side well inside its thirds.
THIRDS = ((0.0, 0.27), (0.4, 0.6), (0.73, 1.0))
# (unit vector along the side's direction, y pointing down)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
STEEPEST = 0.4  # sideways offset of a neighbour per unit of distance
CLEARLY_NEARER = 1.4  # the next candidate must be this much farther
CLEAR_OFFSET = 0.15  # share of the picture's side
SAME_ROW, OTHER_ROW = 0.07, 0.18  # shares of the height


def ninth(size: tuple[int, int], thing: Thing) -> str | None:
    """'top left' ... 'bottom right' if the object's centre lies well inside that ninth of the picture."""
    column, row = _third(thing.x / size[0]), _third(thing.y / size[1])
    if column is None or row is None:
        return None
    return " ".join(word for word in (ROWS[row], COLUMNS[column]) if word) or "center"


def _third(share: float) -> int | None:
    return next((third for third, (start, end) in enumerate(THIRDS) if start <= share <= end), None)


def is_beside(size: tuple[int, int], thing: Thing, side: str, mate: Thing) -> bool:
    """Whether `thing` is clearly on that side of `mate`, however far up or down (or left or right) it is."""
    along, _ = _offset(mate, thing, side)
    return along >= CLEAR_OFFSET * size[0 if side in ("left", "right") else 1] and _clears(mate, thing, along)


def beside(scene: Scene, thing: Thing, side: str) -> Thing | None:
    """The one object that is the neighbour of `thing` on that side."""
    found: list[tuple[float, float, Thing]] = []
    for other in scene.things:
        along, across = _offset(thing, other, side)
        if along > 0 and other is not thing:
            found.append((along + 2 * across, across / along, other))
    found.sort(key=lambda entry: entry[0])
    if not found or found[0][1] > STEEPEST or not is_beside(scene.size, found[0][2], side, thing):
        return None
    if len(found) > 1 and found[1][0] < CLEARLY_NEARER * found[0][0]:
        return None
    return found[0][2]


def reading_groups(scene: Scene) -> list[list[Thing]] | None:
    """Objects of the same colour and shape together, in the reading order (rows, then left to right) of the
    first of each; None if it is not clear which of two objects comes first."""
    things = _reading_order(scene)
    if things is None:
        return None
    groups: dict[str, list[Thing]] = {}
    for thing in things:
        groups.setdefault(thing.name, []).append(thing)
    return list(groups.values())


def _reading_order(scene: Scene) -> Sequence[Thing] | None:
    height = scene.size[1]
    rows: list[list[Thing]] = []
    for thing in sorted(scene.things, key=lambda thing: thing.y):
        if rows and (thing.y - rows[-1][0].y) / height <= SAME_ROW:
            rows[-1].append(thing)
        elif rows and (thing.y - rows[-1][-1].y) / height < OTHER_ROW:
            return None
        else:
            rows.append([thing])
    return [thing for row in rows for thing in sorted(row, key=lambda thing: thing.x)]


def _offset(origin: Thing, thing: Thing, side: str) -> tuple[float, float]:
    """Pixels from `origin` towards that side, and pixels aside of that line."""
    step_x, step_y = DIRECTIONS[side]
    right, down = thing.x - origin.x, thing.y - origin.y
    return right * step_x + down * step_y, abs(right * step_y) + abs(down * step_x)


def _clears(one: Thing, other: Thing, along: float) -> bool:
    """The two do not overlap when looked at from the side's direction."""
    return along >= 0.4 * (one.diameter + other.diameter)
