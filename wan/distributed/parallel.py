"""What a task needs to know of parallelism: one object, whose default is the plain case of a process alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning.merge import Merge
from wan.distributed.mesh import Layout, Mesh, layout_problems, make_mesh
from wan.distributed.runtime import Broken, Runtime, Team
from wan.distributed.sequence import split_tokens
from wan.distributed.vae_parallel import SplitVAE
from wan.loading.stream import ReadError, Store, load
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError, WanError

Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Parallel:
    """One process's part in a run: which jobs are its group's, and how the group makes one video together."""

    runtime: Runtime = field(default_factory=Runtime)
    mesh: Mesh = field(default_factory=Mesh)

    @property
    def team(self) -> Team:
        """The ranks that make one video together."""
        return Team(self.mesh.sequence_rank, self.mesh.layout.sequence, self.mesh.patient)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every data-th item: those of this rank's sequence group."""
        return list(items[self.mesh.data_rank :: self.mesh.layout.data])

    def same(self, x: Tensor) -> Tensor:
        """The first rank's `x` on all ranks of the group: random numbers depend on the kind of GPU."""
        if self.mesh.sequence is not None:
            dist.broadcast(x, dist.get_global_rank(self.mesh.sequence, 0), group=self.mesh.sequence)
        return x

    def together(self, work: Callable[[], Item]) -> Item:
        """`work()`, in which the ranks of the group exchange tensors.

        A WanError in it is one that all of them come to, unless a file cannot be read here. After that or any other
        the rest of the group waits for an exchange that never comes: `Broken` ends the run.
        """
        try:
            return work()
        except Exception as error:
            if self.mesh.sequence is None or (isinstance(error, WanError) and not isinstance(error, ReadError)):
                raise
            raise Broken from error

    def load(
        self,
        module: Module,
        store: Store,
        *,
        sharded: bool,
        home: torch.device,
        dtype: Callable[[str], torch.dtype],
        merge: Merge | None = None,
        report: Callable[[int], None] = lambda _: None,
    ) -> Module:
        """`module` with its weights, or with this rank's shards of them."""
        if sharded and self.mesh.shards is not None:
            from wan.distributed.fsdp import load_sharded  # takes seconds to import

            return load_sharded(module, store, self.mesh.shards, home=home, dtype=dtype, merge=merge, report=report)
        return load(module, store, home=home, dtype=dtype, merge=merge, report=report)

    def split_tokens(self, model: WanModel) -> None:
        split_tokens(model, self.mesh)

    def split_frames(self, vae: WanVAE) -> WanVAE | SplitVAE:
        return vae if self.mesh.sequence is None else SplitVAE(vae, self.mesh)


def parallelize(runtime: Runtime, layout: Layout, device: torch.device) -> Parallel:
    """Connect the processes of `runtime` as `layout` says; all of them must call this. device: of the networks."""
    return Parallel(runtime, make_mesh(layout, device.type, runtime.team.rank))


def layout_for(runtime: Runtime, device: torch.device, heads: int, ulysses: int, ring: int, sharded: bool) -> Layout:
    """The division of the world for a model with so many attention heads. InputError if it cannot be divided so.

    sharded: some weights are to be sharded.
    """
    layout = Layout(runtime.team.size, ulysses, ring)
    problems = layout_problems(layout, heads, sharded)
    if device.type == "cuda" and layout.world > 1:
        if not runtime.uses_gpus:
            count = torch.cuda.device_count()
            problems.append(f"more processes than GPUs on this machine: use --nproc-per-node {count}, or --device cpu")
        elif device.index not in (None, torch.cuda.current_device()):
            problems.append(f"--device {device}: under torchrun each process takes its own GPU; use --device cuda")
    if problems:
        raise InputError(problems)
    return layout
