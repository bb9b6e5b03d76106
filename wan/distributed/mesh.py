"""How a world of processes is divided: data x ring x ulysses. Which divisions are legal, and the groups they make.

The innermost axis is Ulysses, then the ring; together they are a sequence group, whose ranks make one video. Sequence
groups take different jobs. Ranks are numbered so that a sequence group sits on neighbouring ranks: on one machine
wherever it fits. The arithmetic imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wan.distributed.runtime import PATIENCE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


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
    """What forbids this layout for a model with so many attention heads, as sentences that name the legal values.

    sharded: weights are to be sharded over the sequence group, which needs one of at least two processes.
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
        alone = "and here each works alone"
        return [f"--dit_fsdp and --t5_fsdp shard over the processes that share a video, {alone}; give {hint}"]
    return []


def flag_conflicts(
    *, ring: int, attention: str, t5_fsdp: bool, t5_cpu: bool, dit_fsdp: bool, lora_mode: str
) -> list[str]:
    """Which of these settings exclude each other, as sentences."""
    problems = []
    if ring > 1 and attention not in ("auto", "sdpa"):
        problems.append(
            f"--attention {attention}: a ring (--ring_size {ring}) merges results of PyTorch's kernel; use sdpa"
        )
    if t5_fsdp and t5_cpu:
        problems.append("--t5_fsdp and --t5_cpu exclude each other; give one of them")
    if dit_fsdp and lora_mode == "adapter":
        problems.append("--lora_mode adapter keeps LoRAs beside whole weights; with --dit_fsdp use --lora_mode merge")
    return problems


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(sizes: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))


@dataclass(frozen=True)
class Mesh:
    """One process's place in a layout, and the groups it belongs to (None: it is alone in that dimension)."""

    layout: Layout = field(default_factory=Layout)
    data_rank: int = 0
    sequence_rank: int = 0
    sequence: ProcessGroup | None = None
    ulysses: ProcessGroup | None = None
    ring: ProcessGroup | None = None
    patient: ProcessGroup | None = None  # the sequence group again, for messages that may be waited for long
    shards: DeviceMesh | None = None  # the sequence group again, as FSDP wants it

    @property
    def ring_rank(self) -> int:
        return self.sequence_rank // self.layout.ulysses


def make_mesh(layout: Layout, device: str, rank: int) -> Mesh:
    """The groups of `layout` for tensors on `device` ("cuda" or "cpu"); every process of the world must call this."""
    data_rank, sequence_rank = divmod(rank, layout.sequence)
    if layout.sequence == 1:
        return Mesh(layout, data_rank)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    outer = init_device_mesh(device, (layout.data, layout.sequence), mesh_dim_names=("data", "sequence"))
    ulysses, ring = outer.get_group("sequence"), None
    if layout.ring > 1:
        axes = {"data": layout.data, "ring": layout.ring, "ulysses": layout.ulysses}
        inner = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
        ulysses, ring = inner.get_group("ulysses"), inner.get_group("ring")
    members = [list(range(first, first + layout.sequence)) for first in range(0, layout.world, layout.sequence)]
    patients = [dist.new_group(ranks, timeout=PATIENCE, backend="gloo") for ranks in members]
    return Mesh(
        layout,
        data_rank,
        sequence_rank,
        sequence=outer.get_group("sequence"),
        ulysses=ulysses if layout.ulysses > 1 else None,
        ring=ring,
        patient=patients[data_rank],
        shards=outer["sequence"],
    )
