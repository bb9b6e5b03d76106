"""The order of copies and computation on a device: copies have a stream of their own, slots carry the events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.utils.accelerator import Accelerator


@dataclass(eq=False)
class Slot:
    """Device memory for one block, and the events between which it is written and used."""

    index: int
    memory: Tensor
    block: int | None = None
    written: torch.Event | None = None
    used: torch.Event | None = None


class CopyStream:
    """The plain case, a device that does one thing after the other: it only takes the time.

    The prefetching thread calls `write`, the computing thread the rest.
    """

    def __init__(self) -> None:
        self._waited = 0.0

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
        super().__init__()
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
        """By the device's clock: from the end of the work issued before to the start of the work issued after."""
        before, after = (self.api.Event(enable_timing=True) for _ in range(2))
        stream = self.api.current_stream(self.device)
        before.record(stream)
        yield
        after.record(stream)
        self._waits.append((before, after))
        self._sum_up()

    def _sum_up(self) -> None:
        """Add the waits that are over and free their events: a long batch has millions."""
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._waited += before.elapsed_time(after) / 1e3

    @property
    def waited(self) -> float:
        """As above; waits for the device."""
        if self._waits:
            self._waits[-1][1].synchronize()
            self._sum_up()
        return self._waited


def copy_stream(device: torch.device) -> CopyStream:
    return GpuCopyStream(device) if Accelerator(device).has_memory else CopyStream()
