"""Processes that work together: how they exchange values and fail together.

The rule: an exchange is collective: all ranks enter it, or none does. A barrier before it says whether one has failed;
if so, all leave the common work there and learn why. So no rank waits for an exchange that never comes, and a job that
fails on one rank fails on all. A barrier is an all-reduce of one number between the CPUs: it waits for no GPU. Imports
torch only for many processes.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from wan.utils.errors import InputError, JobError, WanError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")
PATIENCE_VARIABLE = "WAN_PATIENCE"
PATIENCE_MINUTES = 60.0  # a network from a slow disk, a large file of prompts to extend
ORIGIN = "origin"  # attribute of an exception that came from another process


class Broken(BaseException):  # no Exception: nobody may go on after it
    """An exchange failed, for the reason given as its cause: the processes are no longer in step."""


class PeerFailed(BaseException):  # no Exception: only `Team.all_or_none` may catch it, and knows why
    """Another process has left the common work."""


def patience() -> timedelta:
    """How long a process waits for another one before it counts as lost: WAN_PATIENCE, in minutes. InputError."""
    text = os.environ.get(PATIENCE_VARIABLE, str(PATIENCE_MINUTES))
    try:
        limit = timedelta(minutes=float(text))
    except (ValueError, OverflowError):
        limit = timedelta()
    if not timedelta() < limit < timedelta(days=20):  # gloo counts milliseconds in 32 bits
        raise InputError(f"{PATIENCE_VARIABLE}={text}: must be minutes, above 0 and below 28800 (20 days)")
    return limit


@dataclass(frozen=True)
class Team:
    """Processes that work together; rank 0 prints and writes for all. group: on the CPUs, by gloo."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def barrier(self, failed: bool = False) -> None:
        """Wait until all are here. `PeerFailed` on all if one of them is here because it failed."""
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
        """Context manager for a collective of all ranks and little else: an error inside ends the run."""
        self.barrier()
        with unbroken():
            yield

    def gather(self, value: Result) -> list[Result]:
        """The values of all ranks, on all ranks."""
        self.barrier()
        return self._gather(value)

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """`work()` on every rank; if it fails on one, all ranks raise the error of the lowest rank that failed.

        Inside it, all ranks make the same exchanges, and with no other process.
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
            error = None  # else it and this frame keep each other alive, with all tensors of the failed work
        raise AssertionError("one rank failed, or all would have passed the barrier")

    def broadcast(self, make: Callable[[], Result]) -> Result:
        """`make()` of rank 0, on all ranks; if it fails, all raise its error."""
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
    """Turn an error into `Broken`: the other processes are in the same exchange and cannot learn of it."""
    try:
        yield
    except Exception as error:
        raise Broken from error


class Origin(NamedTuple):
    """The process that raised an exception, and its traceback; "" where the message is enough."""

    process: int
    traceback: str


def origin_of(error: BaseException) -> Origin:
    """From an exception of another process its own, else this process."""
    import torch
    import torch.distributed as dist

    if hasattr(error, ORIGIN):
        return getattr(error, ORIGIN)
    many = dist.is_available() and dist.is_initialized()
    process = dist.get_rank() if many else 0
    if isinstance(error, WanError | OSError | MemoryError | torch.OutOfMemoryError):
        return Origin(process, "")
    place = f"in process {process}:\n" if many else ""
    return Origin(process, place + "".join(traceback.format_exception(error)).rstrip())


def _portable(error: Exception) -> Exception:
    """A copy of `error` for other processes, with its origin."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its constructor needs
        copy = JobError(f"{type(error).__name__}: {error}")
    setattr(copy, ORIGIN, origin_of(error))
    return copy
