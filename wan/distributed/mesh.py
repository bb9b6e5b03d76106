"""How processes are divided, data x ring x ulysses: which divisions are legal, and their groups.

Ulysses is the innermost axis, then the ring; together they form a sequence group, whose ranks make one video. Sequence
groups take different jobs. A sequence group has neighbouring ranks: on one machine wherever it fits. The arithmetic
imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from wan.distributed.process_group import Team, patience

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Item = TypeVar("Item")


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
    """Why this layout is illegal for a model with `heads` attention heads, with the legal values.

    sharded: over the ranks of a sequence group, which must then be at least two.
    """
    world, ulysses, ring = layout.world, layout.ulysses, layout.ring
    if ring < 1 or world % ring:
        return [f"--ring_size {ring}: must divide the {world} processes; legal here: {_listed(divisors(world))}"]
    legal = [size for size in divisors(world // ring) if heads % size == 0]
    if ulysses not in legal:
        share = f"the {world} processes" + (f" / --ring_size {ring}" if ring > 1 else "")
        return [f"--ulysses_size {ulysses}: must divide {share} and the model's {heads} heads; legal: {_listed(legal)}"]
    if sharded and layout.sequence == 1:
        larger = [size for size in legal if size > 1]
        hint = f"--ulysses_size {_listed(larger)}" if larger else f"--ring_size {world}"
        return [f"--dit_fsdp and --t5_fsdp shard over the processes that share a video; here each works alone: {hint}"]
    return []


def device_problems(layout: Layout, device: torch.device, uses_gpus: bool) -> list[str]:
    """Why these processes cannot use `device`. uses_gpus: each process has taken a GPU of its own."""
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


def flag_conflicts(
    *, ring: int, attention: str, t5_fsdp: bool, t5_cpu: bool, dit_fsdp: bool, lora_mode: str, quantize: str
) -> list[str]:
    """The settings that exclude each other."""
    problems = []
    if ring > 1 and attention not in ("auto", "sdpa"):
        problems.append(
            f"--attention {attention}: a ring (--ring_size {ring}) merges results of PyTorch's kernel; use sdpa"
        )
    if t5_fsdp and t5_cpu:
        problems.append("--t5_fsdp and --t5_cpu exclude each other; give one of them")
    if dit_fsdp and quantize != "none":
        problems.append(f"--quantize {quantize}: FSDP shards whole layers of one dtype; leave it or --dit_fsdp out")
    if dit_fsdp and lora_mode == "adapter":
        problems.append("--lora_mode adapter keeps LoRAs beside whole weights; with --dit_fsdp use --lora_mode merge")
    return problems


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(sizes: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))


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
    def sequence_rank(self) -> int:
        return self.team.rank

    @property
    def ring_rank(self) -> int:
        return self.team.rank // self.layout.ulysses

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This sequence group's items: every data-th one."""
        return list(items[self.data_rank :: self.layout.data])

    def same(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on all ranks of the group: random numbers depend on the kind of GPU."""
        if self.sequence is not None:
            import torch.distributed as dist

            with self.team.exchange():
                dist.broadcast(x, dist.get_global_rank(self.sequence, 0), group=self.sequence)
        return x


def make_mesh(layout: Layout, device: str, rank: int) -> Mesh:
    """The groups of `layout` for tensors on a kind of device. Collective over all processes."""
    data_rank, sequence_rank = divmod(rank, layout.sequence)
    if layout.sequence == 1:
        return Mesh(layout, data_rank)
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    def mine(groups: list[range], backend: str | None = None) -> ProcessGroup:
        members = [list(group) for group in groups]
        return dist.new_subgroups_by_enumeration(members, timeout=patience(), backend=backend)[0]

    sequences = [range(first, first + layout.sequence) for first in range(0, layout.world, layout.sequence)]
    team = Team(sequence_rank, layout.sequence, mine(sequences, "gloo"))
    sequence = mine(sequences)
    ulysses: ProcessGroup | None = sequence
    ring: ProcessGroup | None = sequence
    if layout.ring == 1:
        ring = None
    elif layout.ulysses == 1:
        ulysses = None
    else:
        heads = layout.ulysses
        ulysses = mine([range(first, first + heads) for first in range(0, layout.world, heads)])
        ring = mine([group[index::heads] for group in sequences for index in range(heads)])
    shards = DeviceMesh.from_group(sequence, device)
    return Mesh(layout, data_rank, team, sequence, ulysses, ring, shards)
