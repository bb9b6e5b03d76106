"""The prefetcher follows the known list of uses ahead of the computation and brings each block into its slot.

Its thread takes the pieces that others read, merges, casts and writes them into the slot. Nothing is ever copied back:
the file is the master copy, cached by the system. The numbers do not depend on the number of slots.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan.offload.budget import Move, schedule
from wan.offload.reader import Piece, Source, allocate, read_ahead, set_parameter
from wan.utils.accelerator import Accelerator

ALIGNMENT = 256  # bytes, of each tensor in a slot: the widest loads of a GPU ask for it


@dataclass(eq=False)
class Slot:
    """Device memory for one block."""

    index: int
    memory: Tensor
    block: int | None = None
    written: torch.Event | None = None
    used: torch.Event | None = None


class CopyStream:
    """The plain case, a device that does one thing after the other: it only takes the time.
    The prefetching thread calls `write`, the computing thread the rest."""

    _waited = 0.0

    @contextmanager
    def write(self, slot: Slot) -> Iterator[None]:
        """Copies issued inside this come after the slot's last use and before the next `enter`."""
        yield

    def enter(self, slot: Slot) -> None:
        """Computation issued from now on comes after the last `write`."""

    def leave(self, slot: Slot) -> None:
        """Computation issued so far ends before the next `write`."""

    def drain(self) -> None:
        """Wait until all copies are done."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in which the device has nothing to compute inside this."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @property
    def waited(self) -> float:
        """Seconds in which computation waited for weights."""
        return self._waited


class GpuCopyStream(CopyStream):
    """A stream for copies beside the current stream of the computing thread."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.api = device, Accelerator(device).api
        self.copies: torch.Stream = self.api.Stream(device)
        self._waits: deque[tuple[torch.Event, torch.Event]] = deque()  # not yet over when last looked at

    @contextmanager
    def write(self, slot: Slot) -> Iterator[None]:
        with self.api.device(self.device), self.api.stream(self.copies):
            assert slot.used is not None, "recorded when the slot was made"
            self.copies.wait_event(slot.used)
            yield
            slot.written = self.copies.record_event()

    def enter(self, slot: Slot) -> None:
        assert slot.written is not None, "its block has arrived"
        self.api.current_stream(self.device).wait_event(slot.written)

    def leave(self, slot: Slot) -> None:
        slot.used = self.api.current_stream(self.device).record_event()

    def drain(self) -> None:
        self.copies.synchronize()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        # by the device's clock: from the end of the work issued before to the start of the work issued after
        before, after = (self.api.Event(enable_timing=True) for _ in range(2))
        stream = self.api.current_stream(self.device)
        before.record(stream)
        yield
        after.record(stream)
        self._waits.append((before, after))
        self._sum_up()

    def _sum_up(self) -> None:
        # and free the events of waits that are over: a long batch has millions
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._waited += before.elapsed_time(after) / 1e3

    @property
    def waited(self) -> float:
        if self._waits:
            self._waits[-1][1].synchronize()
            self._sum_up()
        return self._waited


class BlockWeights:
    """Parameters of a network that are used together: on the meta device, or as views of a slot."""

    def __init__(self, module: nn.Module, source: Source, names: Sequence[str]) -> None:
        self.pieces: list[Piece] = list(source.pieces(names))
        self._owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in names}  # before any wrapping
        self._absent: dict[str, Tensor] = {}
        self._offsets: dict[str, int] = {}
        self.bytes = 0
        for name in names:
            shape, dtype = module.get_parameter(name).shape, source.dtype(name)
            self._absent[name] = torch.empty(shape, dtype=dtype, device="meta")
            self._offsets[name] = self.bytes
            self.bytes += aligned(self._absent[name].nbytes)
        self.remove()

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """The parameters' memory in a slot, by name."""
        places = [(name, self._offsets[name], absent) for name, absent in self._absent.items()]
        return {name: slot[at : at + x.nbytes].view(x.dtype).view(x.shape) for name, at, x in places}

    def put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            set_parameter(self._owners[name], name, tensor)

    def remove(self) -> None:
        self.put(self._absent)


def aligned(count: int) -> int:
    """`count` bytes rounded up to the space that they take in a slot."""
    return math.ceil(count / ALIGNMENT) * ALIGNMENT


class Prefetcher:
    """Brings blocks into slots of equal size. brought: bytes read so far; copies: blocks brought so far."""

    def __init__(self, blocks: Sequence[BlockWeights], device: torch.device, stream: CopyStream | None = None) -> None:
        self.blocks, self.device = list(blocks), device
        self.stream = stream or (GpuCopyStream(device) if Accelerator(device).has_memory else CopyStream())
        self.slot_bytes = max((block.bytes for block in blocks), default=0)
        self.slots: list[Slot] = []
        self.brought, self.copies = 0, 0
        self._slot_of: dict[int, Slot] = {}
        self._uses: Sequence[int] | None = None  # of the job that is under way
        self._over = 0  # how many of them have ended
        self._bringing: Future[None] | None = None
        self._stopped = threading.Event()
        self._changed = threading.Condition()

    def resize(self, count: int | None) -> None:
        """Have `count` slots; None: one for each block. JobError if host memory is full."""
        count = len(self.blocks) if count is None else min(count, len(self.blocks))
        while len(self.slots) > count:
            self.empty(self.slots[-1])
            self.slots.pop()
        while len(self.slots) < count:
            slot = Slot(len(self.slots), allocate(self.slot_bytes, self.device))
            self.stream.leave(slot)  # other work may have used its memory a moment ago
            self.slots.append(slot)

    def preload(self, report: Callable[[int], None] = lambda _: None) -> None:
        """Bring all blocks, to stay. Errors as from `Source.read`."""
        self.resize(None)
        self._stopped.clear()
        self._bring(self._schedule(range(len(self.blocks)), again=True), report)

    @contextmanager
    def job(self, uses: Sequence[int], again: bool = True) -> Iterator[None]:
        """Inside this, `use` finds the blocks of `uses` in turn. again: as for `schedule`."""
        assert self._uses is None, "one job at a time"
        self._uses, self._over = uses, 0
        try:
            with self._beside(self._schedule(uses, again)):
                yield
        finally:
            self._uses = None

    @contextmanager
    def ahead(self, uses: Sequence[int]) -> Iterator[None]:
        """Inside this, the first blocks of `uses` come into the slots. The thread ends with it.
        An error is left to the job of these uses, whose own reads meet it again."""
        moves = [move for move in self._schedule(uses, again=True) if not move.after] if self.slots else []
        with self._beside(moves):
            yield

    @contextmanager
    def _beside(self, moves: Sequence[Move]) -> Iterator[None]:
        """Carry out `moves` in a thread up to the end of the block."""
        self._stopped.clear()
        with ThreadPoolExecutor(1, thread_name_prefix="prefetcher") as pool:
            self._bringing = pool.submit(self._bring, moves)
            self._bringing.add_done_callback(lambda _: self._notify())
            try:
                yield
            finally:
                self._bringing = None
                self._stopped.set()
                self._notify()

    @contextmanager
    def use(self, block: int) -> Iterator[None]:
        """The block is on the device inside this. An error while it was brought is raised here."""
        with self.stream.waiting():
            with self._changed:
                planned = self._uses[self._over] if self._uses is not None else block
                assert block == planned, f"block {block} is used, {planned} was planned"
                while block not in self._slot_of:
                    assert self._bringing is not None, "outside of a job only blocks loaded before are there"
                    if self._bringing.done():
                        self._bringing.result()
                    self._changed.wait()
                slot = self._slot_of[block]
            self.stream.enter(slot)
        yield
        self.stream.leave(slot)
        with self._changed:
            self._over += 1
            self._changed.notify_all()

    def _schedule(self, uses: Sequence[int], again: bool) -> list[Move]:
        held = {block: slot.index for block, slot in self._slot_of.items()}
        return schedule(uses, len(self.slots), held, again=again)

    def _bring(self, moves: Sequence[Move], report: Callable[[int], None] = lambda _: None) -> None:
        """Carry out `moves`. However it ends, all copies are done then: slots may be freed."""
        pieces = [piece for move in moves for piece in self.blocks[move.block].pieces]
        try:
            with closing(read_ahead(pieces, self.device)) as arriving:
                all(self._fill(move, arriving, report) for move in moves)
        finally:
            self.stream.drain()

    def _fill(self, move: Move, arriving: Iterator[tuple[Piece, Tensor]], report: Callable[[int], None]) -> bool:
        """Bring one block as soon as its slot may be written; False if the job ended meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or self._over >= move.after)
            if self._stopped.is_set():
                return False
        slot, block = self.slots[move.slot], self.blocks[move.block]
        self.empty(slot)
        views = block.views(slot.memory)
        with self.stream.write(slot):
            for _ in block.pieces:
                if self._stopped.is_set():
                    return False
                piece, tensor = next(arriving)
                piece.source.place(piece, tensor, views)
                self.brought += tensor.nbytes
                report(piece.bytes)
        with self._changed:
            block.put(views)
            self._slot_of[move.block], slot.block = slot, move.block
            self.copies += 1
            self._changed.notify_all()
        return True

    def empty(self, slot: Slot) -> None:
        with self._changed:
            if slot.block is not None:
                self.blocks[slot.block].remove()
                del self._slot_of[slot.block]
                slot.block = None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
