"""Processes that work together: their division data x ring x ulysses, how they exchange values and fail together.

Ulysses is the innermost axis, then the ring; together they form a sequence group of neighbouring ranks, which make one
video. Sequence groups take different jobs. Imports torch only for many processes.

An exchange is collective: all ranks enter it, or none does. A barrier before it says whether one has failed; if so, all
leave the common work there and learn why. A barrier is an all-reduce between the CPUs: it waits for no GPU.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from wan.utils.errors import InputError, JobError, WanError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")
PATIENCE_VARIABLE = "WAN_PATIENCE"


class Broken(BaseException):  # no Exception: nobody may go on after it
    """An exchange failed, for the reason given as its cause: the processes are no longer in step."""


class PeerFailed(BaseException):  # no Exception: only `Team.all_or_none` may catch it, and knows why
    """Another process has left the common work."""


def patience() -> timedelta:
    """How long a process waits for another one: WAN_PATIENCE, in minutes. InputError."""
    text = os.environ.get(PATIENCE_VARIABLE, "60")  # a network from a slow disk, a large file of prompts to extend
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
        """For a collective of all ranks and little else: an error inside ends the run."""
        self.barrier()
        with unbroken():
            yield

    def gather(self, value: Result) -> list[Result]:
        """The values of all ranks, on all ranks."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self.exchange():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """`work()` on every rank; if it fails on one, all ranks raise the error of the lowest rank that failed.
        Inside it, all ranks make the same exchanges, and with no other process."""
        if self.group is None:
            return work()
        error = chosen = None
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
            for rank, (host, reported) in enumerate(self.gather((socket.gethostname(), error and _portable(error)))):
                if reported is None:
                    continue
                chosen = error if error and rank == self.rank else reported
                where = f"process {origin_of(reported)[0]} on {host}: "
                if rank and isinstance(chosen, WanError):  # the first process may have no such fault
                    chosen.problems[:] = [p if p.startswith("process ") else where + p for p in chosen.problems]
                raise chosen
        finally:
            error = chosen = None  # else it and this frame keep each other alive, with all tensors of the failed work
        raise AssertionError("one rank failed, or all would have passed the barrier")

    def broadcast(self, make: Callable[[], Result]) -> Result:
        """`make()` of rank 0, on all ranks; if it fails, all raise its error."""
        made = self.all_or_none(lambda: [make()] if self.is_rank0 else [])
        return self.gather(made)[0][0]


@contextmanager
def unbroken() -> Iterator[None]:
    """Turn an error into `Broken`: the other processes are in the same exchange and cannot learn of it."""
    try:
        yield
    except Exception as error:
        raise Broken from error


def origin_of(error: BaseException) -> tuple[int, str]:
    """The process that raised an exception and its traceback; "" where the message is enough."""
    import torch
    import torch.distributed as dist

    if found := getattr(error, "origin", None):
        return found
    many = dist.is_available() and dist.is_initialized()
    process = dist.get_rank() if many else 0
    if isinstance(error, WanError | OSError | MemoryError | torch.OutOfMemoryError):
        return process, ""
    place = f"in process {process}:\n" if many else ""
    return process, place + "".join(traceback.format_exception(error)).rstrip()


def _portable(error: Exception) -> Exception:
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its constructor needs
        copy = JobError(f"{type(error).__name__}: {error}")
    copy.origin = origin_of(error)  # type: ignore[attr-defined]  # from another process
    return copy


@dataclass(frozen=True)
class Layout:
    """world = data x ring x ulysses processes."""

    world: int = 1
    ulysses: int = 1
    ring: int = 1

    @property
    def sequence(self) -> int:
        """Processes that make one video together."""
        return self.ulysses * self.ring

    @property
    def data(self) -> int:
        """Sequence groups, each with jobs of its own."""
        return self.world // self.sequence

    def __str__(self) -> str:
        ring = f" x ring {self.ring}" if self.ring > 1 else ""
        return f"{self.world} processes = data {self.data}{ring} x ulysses {self.ulysses}"


def layout_problems(layout: Layout, heads: int, sharded: bool) -> list[str]:
    """Why this layout is illegal, with the legal values. sharded: over the ranks of a sequence group."""
    world, ulysses, ring = layout.world, layout.ulysses, layout.ring
    if ring < 1 or world % ring:
        return [f"--ring_size {ring}: must divide the {world} processes; legal here: {str(divisors(world))[1:-1]}"]
    legal = [size for size in divisors(world // ring) if heads % size == 0]
    if ulysses not in legal:
        share = f"the {world} processes{f' / --ring_size {ring}' if ring > 1 else ''} and the model's {heads} heads"
        return [f"--ulysses_size {ulysses}: must divide {share}; legal: {str(legal)[1:-1]}"]
    if sharded and layout.sequence == 1:
        hint = f"--ulysses_size {legal[-1]}" if legal[-1] > 1 else f"--ring_size {world}"
        return [f"--dit_fsdp and --t5_fsdp shard over the processes that share a video; here each works alone: {hint}"]
    return []


def device_problems(layout: Layout, device: torch.device, uses_gpus: bool) -> list[str]:
    """Why these processes cannot use `device`. uses_gpus: each has taken a GPU of its own."""
    if layout.world == 1 or device.type == "cpu":
        return []
    from wan.utils.accelerator import Accelerator

    accelerator = Accelerator(device)
    if not accelerator.has_memory:
        return [f"--device {device}: serves one process, not {layout.world}; use --device cpu"]
    if not uses_gpus:
        usable = f"--nproc-per-node {accelerator.api.device_count()}, or --device cpu"
        return [f"more processes than GPUs on this machine: use {usable}"]
    if device.index is not None and device.index != accelerator.api.current_device():
        return [f"--device {device}: under torchrun each process takes its own GPU; use --device {device.type}"]
    return []


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@dataclass(frozen=True)
class Mesh:
    """One process's position in a layout, and its groups (None: it is alone in that dimension)."""

    layout: Layout = field(default_factory=Layout)
    data_rank: int = 0
    team: Team = field(default_factory=Team)  # the ranks of the sequence group
    sequence: ProcessGroup | None = None  # the same ranks, for tensors
    ulysses: ProcessGroup | None = None
    ring: ProcessGroup | None = None
    shards: DeviceMesh | None = None  # the same ranks, for FSDP

    @property
    def ring_rank(self) -> int:
        return self.team.rank // self.layout.ulysses

    def same(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on all ranks of the group: random numbers depend on the kind of GPU."""
        if self.sequence is not None:
            import torch.distributed as dist

            with self.team.exchange():
                dist.broadcast(x, dist.get_global_rank(self.sequence, 0), group=self.sequence)
        return x


def make_mesh(layout: Layout, device: str, rank: int) -> Mesh:
    """The groups of `layout` for tensors on a kind of device. Collective over all processes."""
    data_rank, own = divmod(rank, layout.sequence)
    if layout.sequence == 1:
        return Mesh(layout, data_rank)
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    def mine(groups: list[range], backend: str | None = None) -> ProcessGroup:
        members = [list(group) for group in groups]
        return dist.new_subgroups_by_enumeration(members, timeout=patience(), backend=backend)[0]

    sequences = [range(first, first + layout.sequence) for first in range(0, layout.world, layout.sequence)]
    team = Team(own, layout.sequence, mine(sequences, "gloo"))
    sequence, heads = mine(sequences), layout.ulysses
    ulysses, ring = sequence if heads > 1 else None, sequence if layout.ring > 1 else None
    if ulysses and ring:
        ulysses = mine([range(first, first + heads) for first in range(0, layout.world, heads)])
        ring = mine([group[index::heads] for group in sequences for index in range(heads)])
    shards = DeviceMesh.from_group(sequence, device)
    return Mesh(layout, data_rank, team, sequence, ulysses, ring, shards)
