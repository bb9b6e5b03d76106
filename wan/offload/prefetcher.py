"""The walker: it goes ahead of the computation along the known list of uses and brings each unit into its slot.

A thread of its own takes the pieces that others read, merges, casts and writes them into the slot; the computation
waits for the unit it is about to run and tells when it is done with it. Nothing is ever copied back: the file is the
master copy, and the page cache the tier between. The numbers do not depend on the number of slots.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn

from wan.offload.copy_stream import Lane, Slot, lane_for
from wan.offload.eviction import Move, schedule
from wan.offload.reader import PIECE_BYTES, Piece, Place, Source, memory, read_ahead
from wan.utils.accelerator import Accelerator

ALIGNMENT = 256  # bytes, of each tensor in a slot: what the widest loads of a GPU ask for


class Unit:
    """Parameters of a network that are used together: on the meta device, or as views of a slot."""

    def __init__(self, module: nn.Module, source: Source, names: Sequence[str]) -> None:
        self.pieces: list[Piece] = list(source.pieces(names))
        self._places = {name: Place.of(module, name) for name in names}
        self._absent: dict[str, Tensor] = {}
        self._offsets: dict[str, int] = {}
        self.bytes = 0
        for name in names:
            shape, dtype = module.get_parameter(name).shape, source.dtype(name)
            self._absent[name] = torch.empty(shape, dtype=dtype, device="meta")
            self._offsets[name] = self.bytes
            self.bytes += aligned(self._absent[name].nbytes)
        self.put(self._absent)

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """The parameters' places in a slot's memory, by name."""
        return {
            name: slot[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, start in self._offsets.items()
            for tensor in [self._absent[name]]
        }

    def put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._places[name].put(tensor)

    def remove(self) -> None:
        self.put(self._absent)


def aligned(count: int) -> int:
    """`count` bytes as they lie in a slot."""
    return math.ceil(count / ALIGNMENT) * ALIGNMENT


class Walker:
    """Brings units into slots of equal size. One job at a time.

    brought: bytes read so far; copies: units brought so far.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, lane: Lane | None = None) -> None:
        self.units, self.device, self.lane = list(units), device, lane or lane_for(device)
        self.slot_bytes = max((unit.bytes for unit in units), default=0)
        self.slots: list[Slot] = []
        self.brought, self.copies = 0, 0
        self._where: dict[int, Slot] = {}
        self._uses: Sequence[int] | None = None  # of the job that is under way
        self._over = 0  # how many of them are
        self._walking: Future[None] | None = None
        self._stopped = False
        self._changed = threading.Condition()

    def resize(self, count: int) -> None:
        """Have `count` slots, or as many as there are units if that is fewer. JobError for a full host."""
        count = min(count, len(self.units))
        while len(self.slots) > count:
            self._remove(self.slots[-1])
            self.slots.pop()
        while len(self.slots) < count:
            slot = Slot(len(self.slots), memory(self.slot_bytes, self.device))
            self.lane.leave(slot)  # its memory may have been something else's a moment ago
            self.slots.append(slot)

    def preload(self, report: Callable[[int], None] = lambda _: None) -> None:
        """Fill the empty slots with the units that come first. Errors as from `Source.read`."""
        moves = self._schedule(range(len(self.units)), again=True)
        self._stopped = False
        self._bring([move for move in moves if not move.after], report)

    @contextmanager
    def job(self, uses: Sequence[int], again: bool = True) -> Iterator[None]:
        """Inside this the units of `uses` are there in turn, each with `use`. All threads end with it.

        again: a job with the same uses follows.
        """
        assert self._uses is None, "one job at a time"
        self._uses, self._over, self._stopped = uses, 0, False
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="walker") as pool:
                self._walking = pool.submit(self._bring, self._schedule(uses, again))
                self._walking.add_done_callback(lambda _: self._tell())
                try:
                    yield
                finally:
                    self._stopped = True
                    self._tell()
        finally:
            self._uses = self._walking = None

    @contextmanager
    def ahead(self, uses: Sequence[int]) -> Iterator[None]:
        """Beside what is done inside this, the slots get what a job of `uses` begins with. The thread ends with it.

        What goes wrong is left to that job, whose own reads meet it again.
        """
        self._stopped = False
        moves = [move for move in self._schedule(uses, again=True) if not move.after] if self.slots else []
        with ThreadPoolExecutor(1, thread_name_prefix="walker") as pool:
            pool.submit(self._bring, moves)
            try:
                yield
            finally:
                self._stopped = True
                self._tell()

    @contextmanager
    def use(self, unit: int) -> Iterator[None]:
        """The unit is on the device inside this. What went wrong while it was brought is raised here."""
        with self.lane.waiting():
            slot = self._arrived(unit)
            self.lane.enter(slot)
        yield
        self.lane.leave(slot)
        with self._changed:
            self._over += 1
            self._changed.notify_all()

    @property
    def waited(self) -> float:
        """Seconds in which computation waited for weights, so far."""
        return self.lane.waited

    def _arrived(self, unit: int) -> Slot:
        with self._changed:
            if self._uses is not None:
                assert self._uses[self._over] == unit, f"unit {unit} is used, {self._uses[self._over]} was planned"
            while unit not in self._where:
                assert self._walking is not None, "outside of a job only what has been loaded before is there"
                if self._walking.done():
                    self._walking.result()
                self._changed.wait()
            return self._where[unit]

    def _schedule(self, uses: Sequence[int], again: bool) -> list[Move]:
        return schedule(uses, len(self.slots), {unit: slot.index for unit, slot in self._where.items()}, again=again)

    def _bring(self, moves: Sequence[Move], report: Callable[[int], None] = lambda _: None) -> None:
        """Carry out `moves` in turn; runs in a thread of its own beside a job. However it ends, no copy is under way
        then: slots may be freed."""
        largest = max((piece.bytes for unit in self.units for piece in unit.pieces), default=PIECE_BYTES)
        pieces = (piece for move in moves for piece in self.units[move.unit].pieces)
        if not moves:
            return
        try:
            with closing(read_ahead(pieces, largest, pin=Accelerator(self.device).has_memory)) as arriving:
                for move in moves:
                    if not self._free(move) or not self._fill(move, arriving, report):
                        return
        finally:
            self.lane.drain()

    def _fill(self, move: Move, arriving: Iterator[tuple[Piece, Tensor]], report: Callable[[int], None]) -> bool:
        """Bring one unit; False if the job has ended on the way."""
        slot, unit = self.slots[move.slot], self.units[move.unit]
        self._remove(slot)
        views = unit.views(slot.memory)
        with self.lane.write(slot):
            for _ in unit.pieces:
                if self._stopped:
                    return False
                piece, tensor = next(arriving)
                piece.source.place(piece, tensor, views)
                self.brought += tensor.nbytes
                report(piece.bytes)
        self._put(slot, move.unit, views)
        return True

    def _free(self, move: Move) -> bool:
        """Wait until the slot may be written; False if the job has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._over >= move.after)
            return not self._stopped

    def _put(self, slot: Slot, unit: int, views: dict[str, Tensor]) -> None:
        with self._changed:
            self.units[unit].put(views)
            self._where[unit], slot.unit = slot, unit
            self.copies += 1
            self._changed.notify_all()

    def _remove(self, slot: Slot) -> None:
        with self._changed:
            if slot.unit is not None:
                self.units[slot.unit].remove()
                del self._where[slot.unit]
                slot.unit = None

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
