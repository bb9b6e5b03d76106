"""The processes of one run: how they start, agree, fail together and end. One process alone is the plain case.

torchrun starts the processes and ends all of them when one ends badly. Two kinds of waiting are kept apart: collectives
of the computation give up after `COLLECTIVE_LIMIT`; a `Team` waits for as long as the others work (prompt extension, a
slow disk) and still ends at once when one of them dies, because its connection closes. Imports torch only for many.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from wan.utils.errors import JobError, WanError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

Result = TypeVar("Result")
COLLECTIVE_LIMIT = timedelta(minutes=10)
PATIENCE = timedelta(days=7)
GLOO_REST = 0.2  # seconds in which gloo's threads let go of their last tensors; without them torch 2.13 aborts at exit


class Broken(BaseException):  # no Exception: nobody may go on after it
    """One process failed, for the reason given as its cause, while others count on it in a common computation."""


@dataclass(frozen=True)
class Team:
    """Processes that tell each other things; the first one speaks and writes for all."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """Everyone's value by rank, for everyone."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, work: Callable[[], Result]) -> Result:
        """`work()` on every rank; if it fails anywhere, the error of the first rank that failed is raised on all.

        For work without collectives, or with collectives in which even a failing rank takes part to the end.
        """
        if self.group is None:
            return work()
        done: list[Result] = []
        error: Exception | None = None
        try:
            done = [work()]
        except Exception as e:  # noqa: BLE001 - raised below, on all ranks
            error = e
        try:
            for rank, reported in enumerate(self.gather(error and _portable(error, self.rank))):
                if reported is not None:
                    raise error if error and rank == self.rank else reported
        finally:
            error = None  # else it and this frame hold each other, and what failed for want of memory stays in memory
        return done[0]

    def from_first(self, make: Callable[[], Result]) -> Result:
        """`make()` of the first rank, for everyone; if it fails, its error is raised on all."""
        made = self.agree(lambda: [make()] if self.first else [])
        return self.gather(made)[0][0]


@dataclass(frozen=True)
class Runtime:
    """The world of processes that torchrun started; by default this process alone."""

    team: Team = field(default_factory=Team)
    uses_gpus: bool = False  # of many processes: each has a GPU of its own and NCCL connects them
    store: Store | None = None

    @classmethod
    def start(cls) -> Runtime:
        """Connect to the others, if torchrun's environment says that there are any."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        uses_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        if uses_gpus:
            torch.cuda.set_device(local_rank)
        store, _, _ = next(rendezvous("env://", rank, size, timeout=COLLECTIVE_LIMIT))
        backend = "cpu:gloo,cuda:nccl" if uses_gpus else "gloo"
        groups = PrefixStore("groups", store)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=COLLECTIVE_LIMIT)
        patient = dist.new_group(timeout=PATIENCE, backend="gloo")
        return cls(Team(rank, size, patient), uses_gpus, PrefixStore("run", store))

    @classmethod
    def joined(cls) -> Runtime:
        """The processes that the caller's own script has connected with torch.distributed, if it has."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return cls()
        patient = dist.new_group(timeout=PATIENCE, backend="gloo")
        return cls(Team(dist.get_rank(), dist.get_world_size(), patient), "nccl" in dist.get_backend_config())

    def stop(self) -> None:
        """Tell all processes that no further job shall begin."""
        if self.store is not None:
            self.store.add("stop", 1)

    def has_stopped(self) -> bool:
        return self.store is not None and self.store.add("stop", 0) > 0

    def finish(self, code: int) -> int:
        """Leave together; the worst exit code of all."""
        code = max(self.team.gather(code))
        if self.team.group is not None:
            import torch.distributed as dist

            time.sleep(GLOO_REST)
            dist.destroy_process_group()
        return code

    def give_up(self, error: BaseException) -> NoReturn:
        """End this process now. The others notice and follow; whoever fails first is the only one to say why."""
        if self._fails_first():
            sys.stderr.write(_last_words(self.team.rank, error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)  # no clean-up: it would wait for the others

    def _fails_first(self) -> bool:
        assert self.store is not None, "there are others"
        try:
            return self.store.add("failed", 1) == 1
        except RuntimeError:
            return False  # the store is gone, and with it the process that kept it: that one was first


def launch(work: Callable[[Runtime], int]) -> int:
    """Run `work`, which gives an exit code, on every process of the run; the worst code of all.

    Errors that `work` does not turn into a code end the whole run; in a process alone they are simply raised.
    """
    runtime = Runtime.start()
    if runtime.team.group is None:
        return work(runtime)
    try:
        return runtime.finish(work(runtime))
    except BaseException as error:  # noqa: BLE001 - also an interrupt must end the others
        runtime.give_up(error)


def _portable(error: Exception, rank: int) -> Exception:
    """A copy of `error` for other processes; where it is no expected one, with its traceback as a note."""
    import torch

    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its constructor needs
        copy = JobError(f"{type(error).__name__}: {error}")
    if not isinstance(error, WanError | OSError | MemoryError | torch.OutOfMemoryError):
        copy.add_note(f"in process {rank}:\n" + "".join(traceback.format_exception(error)).rstrip())
    return copy


def _last_words(rank: int, error: BaseException) -> str:
    if isinstance(error, Broken) and error.__cause__:
        error = error.__cause__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted\n"
    if isinstance(error, WanError):
        return f"error: {error}\n"
    if _is_connection(error):
        reason = str(error).strip().splitlines()[0]
        return f"error: process {rank} lost another one, which was killed, crashed or hangs ({reason})\n"
    return f"error in process {rank}:\n" + "".join(traceback.format_exception(error))


def _is_connection(error: BaseException) -> bool:
    """Whether a collective failed: PyTorch raises RuntimeError for gloo's failures and DistError for others."""
    import torch.distributed as dist

    gloo = isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "Connection closed by peer" in str(error))
    return gloo or isinstance(error, dist.DistError)
