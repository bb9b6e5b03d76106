"""Which block is brought into which slot, and when: arithmetic on a known list of uses.

A block is a group of weights that is used together. A use is one block at work in one forward; a job's steps give the
list of its uses. A slot holds one block. While a block is at work, those of the next `ahead` uses are in their slots or
on their way, so the last `ahead` blocks before a use are never evicted for it.

Belady's rule chooses the block to evict (the one whose next use is farthest ahead), which loads least. The usual cases
follow from it: everything stays, one network hands its slots to the next, most blocks stream through two slots.
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
    """Bring `block` into `slot` for use number `use`, as soon as the first `after` uses are over."""

    block: int
    slot: int
    use: int
    after: int


@dataclass
class _Stay:
    """One block in one slot, up to its last use there."""

    block: int | None
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

    held: block -> slot at the start. again: a job with the same uses follows, so blocks that it needs first are worth
    keeping. ahead is at most slots - 1.
    """
    ahead = min(ahead, slots - 1)
    uses_of: dict[int, list[int]] = {}
    for index, block in enumerate(uses):
        uses_of.setdefault(block, []).append(index)

    def next_use(block: int, start: int) -> float:
        known = uses_of.get(block, [])
        index = bisect_left(known, start)
        if index < len(known):
            return known[index]
        return known[0] + len(uses) if known and again else math.inf

    here = {block: _Stay(block, slot) for block, slot in (held or {}).items()}
    empty = sorted(set(range(slots)) - {stay.slot for stay in here.values()})
    over = [_Stay(None, slot) for slot in empty]
    brought: list[tuple[int, _Stay]] = []
    for index, block in enumerate(uses):
        if block not in here:
            if len(here) == slots:
                over.append(here.pop(max(here, key=partial(next_use, start=max(0, index - ahead)))))
            here[block] = _Stay(block, -1)
            brought.append((index, here[block]))
        here[block].after = index + 1
    # Each takes the slot that is free first, whoever was evicted for it: the number of loads is the same, and reads
    # start earlier. Sorted, the k-th slot is free in time for the k-th load because any k of them were.
    over.sort(key=lambda stay: stay.after)
    moves = []
    for (index, stay), evicted in zip(brought, over, strict=False):
        assert stay.block is not None
        stay.slot = evicted.slot
        moves.append(Move(stay.block, stay.slot, index, evicted.after))
    return moves
