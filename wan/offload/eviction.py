"""Which weights are brought into which slot, and when: pure arithmetic on a known list of uses.

A unit is a group of weights that is used together (a block). A use is one unit at work in one forward; the list of a
job's uses is known from its steps. A slot holds one unit. While a unit is at work those of the next `ahead` uses are
there already or on their way, so the last `ahead` units before a use are never given up for it.

Which unit gives way follows Belady's rule (the one whose next use lies farthest ahead), which loads least. Everything
stays, one network hands its slots to the next, most blocks pass through two slots: all of these come out of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

AHEAD = 2  # uses; 1 would do if every read took as long as the last


@dataclass(frozen=True)
class Move:
    """Bring `unit` into `slot` for use number `use`, as soon as the first `after` uses are over."""

    unit: int
    slot: int
    use: int
    after: int


@dataclass
class _Stay:
    """One unit in one slot, up to its last use there."""

    unit: int | None
    slot: int
    after: int = 0  # uses that must be over before the slot may be written again


def schedule(
    uses: Sequence[int],
    slots: int,
    held: Mapping[int, int] | None = None,
    *,
    again: bool = True,
    ahead: int = AHEAD,
) -> list[Move]:
    """The moves of one job, in the order in which they are needed.

    held: unit -> slot at the start. again: after this job comes another one with the same uses, so what it needs first
    is worth keeping. ahead is at most slots - 1.
    """
    ahead = min(ahead, slots - 1)
    places: dict[int, list[int]] = {}
    for index, unit in enumerate(uses):
        places.setdefault(unit, []).append(index)

    def next_use(unit: int, start: int) -> float:
        known = places.get(unit, [])
        index = bisect_left(known, start)
        if index < len(known):
            return known[index]
        return known[0] + len(uses) if known and again else math.inf

    here = {unit: _Stay(unit, slot) for unit, slot in (held or {}).items()}
    empty = sorted(set(range(slots)) - {stay.slot for stay in here.values()})
    over = [_Stay(None, slot) for slot in empty]
    brought: list[tuple[int, _Stay]] = []
    for index, unit in enumerate(uses):
        if unit not in here:
            if len(here) == slots:
                over.append(here.pop(max(here, key=partial(next_use, start=max(0, index - ahead)))))
            here[unit] = _Stay(unit, -1)
            brought.append((index, here[unit]))
        here[unit].after = index + 1
    # Each goes to the slot that is free first, whoever was given up for it: the number of loads is the same, and reads
    # start earlier. Sorted, the k-th slot is free in time for the k-th load because any k of them were.
    over.sort(key=lambda stay: stay.after)
    moves = []
    for (index, stay), gone in zip(brought, over, strict=False):
        assert stay.unit is not None
        stay.slot = gone.slot
        moves.append(Move(stay.unit, stay.slot, index, gone.after))
    return moves
