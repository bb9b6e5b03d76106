"""Processes that work on one thing: how they tell each other things, exchange tensors and fail together.

The rule: an exchange between the processes is entered by all of them or by none. Before each one they meet, which says
whether somebody has failed on the way; if so, all drop the common work there and learn why. So nobody is left in an
exchange that never comes, nothing has to be aborted, and one job that fails on one process fails on all of them. A
meeting is an all-reduce of one number between the CPUs: it waits for no GPU. Imports torch only for many processes.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from wan.utils.errors import InputError, JobError, WanError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")
PATIENCE = "WAN_PATIENCE"
PATIENCE_MINUTES = 60.0  # a network from a slow disk, a large file of prompts to extend
ORIGIN = "origin"  # attribute of an exception that came from another process


class Broken(BaseException):  # no Exception: nobody may go on after it
    """An exchange failed, for the reason given as its cause: the processes no longer know of each other."""


class PeerFailed(BaseException):  # no Exception: only `Team.all_or_none` may catch it, and knows why
    """Another process has left the common work that this one is in."""


def patience() -> timedelta:
    """How long a process waits for another one before it takes it for lost: WAN_PATIENCE, in minutes. InputError."""
    given = os.environ.get(PATIENCE, str(PATIENCE_MINUTES))
    try:
        limit = timedelta(minutes=float(given))
    except (ValueError, OverflowError):
        limit = timedelta()
    if not timedelta() < limit < timedelta(days=20):  # gloo counts milliseconds in 32 bits
        raise InputError(f"{PATIENCE}={given}: must be minutes, above 0 and below 28800 (20 days)")
    return limit


@dataclass(frozen=True)
class Team:
    """Processes that work on one thing; the first one speaks and writes for all. group: one of gloo, on the CPU."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def barrier(self, failed: bool = False) -> None:
        """Wait until all have come this far. `PeerFailed` on all if one of them came because it has failed."""
        if self.group is None:
            return
        import torch
        import torch.distributed as dist

        failures = torch.tensor(int(failed))
        with unbroken():
            dist.all_reduce(failures, group=self.group)
        if failures.item():
            raise PeerFailed

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around a collective of all ranks, with as little else in it as can be: what fails in here ends the run."""
        self.barrier()
        with unbroken():
            yield

    def gather(self, value: Result) -> list[Result]:
        """Everyone's value by rank, for everyone."""
        self.barrier()
        return self._gather(value)

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """`work()` on every rank; if it fails anywhere, the error of the first rank that failed is raised on all.

        In it all ranks meet and exchange the same number of times, and with nobody else.
        """
        if self.group is None:
            return work()
        error: Exception | None = None
        try:
            done = work()
            self.barrier()
            return done
        except PeerFailed:
            pass
        except Exception as e:  # noqa: BLE001 - raised below, on all ranks
            error = e
            with suppress(PeerFailed):
                self.barrier(failed=True)
        try:
            for rank, reported in enumerate(self._gather(error and _portable(error))):
                if reported is not None:
                    raise error if error and rank == self.rank else reported
        finally:
            error = None  # else it and this frame hold each other, and what failed for want of memory stays in memory
        raise AssertionError("somebody failed, or all would have met")

    def broadcast(self, make: Callable[[], Result]) -> Result:
        """`make()` of the first rank, for everyone; if it fails, its error is raised on all."""
        made = self.all_or_none(lambda: [make()] if self.is_rank0 else [])
        return self.gather(made)[0][0]

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with unbroken():
            dist.all_gather_object(values, value, group=self.group)
        return values


@contextmanager
def unbroken() -> Iterator[None]:
    """Whatever fails in here is `Broken`: the other processes are in the same exchange and cannot be told."""
    try:
        yield
    except Exception as error:
        raise Broken from error


def expected(error: BaseException) -> bool:
    """Whether its message says enough; of anything else, which is a bug, the traceback is wanted."""
    import torch

    if hasattr(error, ORIGIN):
        return not getattr(error, ORIGIN).traceback
    return isinstance(error, WanError | OSError | MemoryError | torch.OutOfMemoryError)


@dataclass(frozen=True)
class Origin:
    """Where an exception was raised. traceback: of one that is not `expected`, else empty."""

    process: int
    traceback: str


def origin_of(error: BaseException) -> Origin:
    """What the exception brought along from another process, or that it is of this one."""
    import torch.distributed as dist

    if hasattr(error, ORIGIN):
        return getattr(error, ORIGIN)
    many = dist.is_available() and dist.is_initialized()
    process = dist.get_rank() if many else 0
    if expected(error):
        return Origin(process, "")
    place = f"in process {process}:\n" if many else ""
    return Origin(process, place + "".join(traceback.format_exception(error)).rstrip())


def _portable(error: Exception) -> Exception:
    """A copy of `error` for other processes, which says where it is from."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its constructor needs
        copy = JobError(f"{type(error).__name__}: {error}")
    setattr(copy, ORIGIN, origin_of(error))
    return copy
