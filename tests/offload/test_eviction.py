"""The plan of loads: whatever the uses, each unit is there in time, in the slots there are, none read needlessly."""

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wan.offload.budget import Move, schedule

USES = st.lists(st.integers(0, 5), min_size=1, max_size=40)
SLOTS = st.integers(1, 7)
AHEAD = st.integers(0, 3)


def held_after(moves: list[Move], held: dict[int, int]) -> dict[int, int]:
    """unit -> slot when all moves are done."""
    content = {slot: unit for unit, slot in held.items()}
    for move in moves:
        content[move.slot] = move.block
    return {unit: slot for slot, unit in content.items()}


def check(uses: list[int], slots: int, held: dict[int, int], moves: list[Move], ahead: int, eager: bool) -> None:
    """Carry the moves out as early as they may be, or as late as they must be."""
    content = {slot: unit for unit, slot in held.items()}
    pending = list(moves)
    for index, unit in enumerate(uses):
        while pending and (pending[0].after <= index if eager else pending[0].use <= index):
            move = pending.pop(0)
            assert 0 <= move.slot < slots
            assert move.block not in content.values(), "it is there already"
            assert move.after <= max(0, move.use - min(ahead, slots - 1)), "it may begin while others compute"
            content[move.slot] = move.block
        assert unit in content.values()
    assert not pending


at_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other work may share the cores


@at_any_speed
@given(USES, SLOTS, AHEAD, st.booleans(), st.integers(0, 7), st.permutations(range(7)))
def test_every_unit_is_there_in_time(
    uses: list[int], slots: int, ahead: int, again: bool, full: int, order: list[int]
) -> None:
    """Also when units lie in the slots from before, unknown ones among them."""
    held = {unit: slot for slot, unit in enumerate(order[: min(full, slots)])}
    for _ in range(3):
        moves = schedule(uses, slots, held, again=again, ahead=ahead)
        assert [move.use for move in moves] == sorted(move.use for move in moves)
        check(uses, slots, held, moves, ahead, eager=True)
        check(uses, slots, held, moves, ahead, eager=False)
        held = held_after(moves, held)
        assert len(held) <= slots


def fewest_loads(uses: tuple[int, ...], slots: int, ahead: int) -> int:
    """By trying everything. Blocks of the last `ahead` uses stay."""

    @cache
    def rest(index: int, here: frozenset[int]) -> int:
        if index == len(uses):
            return 0
        if uses[index] in here:
            return rest(index + 1, here)
        if len(here) < slots:
            return 1 + rest(index + 1, here | {uses[index]})
        free = here - set(uses[max(0, index - ahead) : index])
        return 1 + min(rest(index + 1, here - {gone} | {uses[index]}) for gone in free)

    return rest(0, frozenset())


@at_any_speed
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 4), AHEAD)
def test_no_plan_loads_less(uses: list[int], slots: int, ahead: int) -> None:
    found = schedule(uses, slots, again=False, ahead=ahead)
    assert len(found) == fewest_loads(tuple(uses), slots, min(ahead, slots - 1))


@at_any_speed
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, 4), AHEAD)
def test_no_plan_loads_less_over_several_jobs(uses: list[int], slots: int, ahead: int) -> None:
    held: dict[int, int] = {}
    total = 0
    for last in (False, False, True):
        moves = schedule(uses, slots, held, again=not last, ahead=ahead)
        held = held_after(moves, held)
        total += len(moves)
    # between two jobs nothing computes, so what was used last may give way there
    assert fewest_loads(tuple(uses * 3), slots, 0) <= total
    assert total <= fewest_loads(tuple(uses * 3), slots, min(ahead, slots - 1))


HIGH, LOW = list(range(40)), list(range(40, 80))


def test_enough_slots_load_everything_once() -> None:
    uses = (HIGH + LOW) * 4
    assert len(schedule(uses, 80)) == 80
    assert {move.after for move in schedule(uses, 80)} == {0}
    assert not schedule(uses, 80, {unit: unit for unit in range(80)})


def test_one_expert_hands_its_slots_to_the_next() -> None:
    """Relay: while the last high step runs, each low block goes where a high block has just been used."""
    moves = schedule(HIGH * 2 + LOW * 2, 40, {unit: unit for unit in HIGH}, again=False)
    assert [(move.block, move.slot, move.after) for move in moves] == [(40 + n, n, 41 + n) for n in range(40)]
    both = schedule(HIGH * 2 + LOW * 2, 40, {unit: unit for unit in HIGH}, again=True)
    assert [(move.block, move.slot, move.after) for move in both] == [(40 + n, n, 41 + n) for n in range(40)]


@pytest.mark.parametrize(("slots", "stay"), [(2, 0), (3, 0), (4, 1), (17, 14), (39, 36)])
def test_some_blocks_stay_and_the_rest_passes_through_three_slots(slots: int, stay: int) -> None:
    """As the plan says it: `14 of 40 blocks stay, 26 pass through 3 slots`. Which ones changes from step to step."""
    steps = 8
    found = len(HIGH) * steps - len(schedule(HIGH * steps, slots, again=False))
    assert stay <= found / (steps - 1) <= stay * 40 / 37 + 1
