"""Weights sharded over the ranks of a sequence group with PyTorch's FSDP2.

A block's weights are gathered when it runs. Every parameter is cut along its first axis; a rank reads only its rows,
and a LoRA is merged on those. Each parameter has its final dtype before it is sharded, and there is no mixed-precision
policy: that would cast what enters a block, the timestep's rows included.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from wan.distributed.mesh import Mesh, Team
from wan.offload.reader import Source, read_ahead
from wan.utils.errors import InputError

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def load_sharded(
    module: Module, source: Source, mesh: Mesh, home: torch.device, report: Callable[[int], None] = lambda _: None
) -> Module:
    """Like `wan.offload.reader.load`, for this rank's rows of the weights. `module` has a list named `blocks`."""
    if home.type == "cpu" and torch.__version__ < "2.7":
        raise InputError(f"--dit_fsdp and --t5_fsdp on a CPU need PyTorch 2.7 or newer, this is {torch.__version__}")
    assert mesh.shards is not None, "a rank alone loads whole weights"
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(source.dtype(name))
    for unit in _units(module):
        # the root stays gathered after a forward by default; torch before 2.8 needs the hook below, too
        fully_shard(unit, mesh=mesh.shards, reshard_after_forward=not _is_vector(unit))
        _gather_together(unit, mesh.team)
    module.register_forward_hook(lambda root, *_: root.reshard())
    module.register_forward_pre_hook(_let_go, prepend=True)
    module.register_forward_pre_hook(partial(_gather_vectors, mesh.team))  # after FSDP's own, which readies the root
    module.to_empty(device=home)
    shards = dict(module.named_parameters())
    rows = {name: shard_rows(p.shape[0], mesh.layout.sequence, mesh.team.rank) for name, p in shards.items()}
    mine = [name for name, share in rows.items() if share.start < share.stop]
    for piece, tensor in read_ahead(list(source.pieces(mine, rows.__getitem__)), home):
        report(tensor.nbytes)
        shard = cast("DTensor", shards[piece.name])  # fully_shard makes every parameter one
        source.place(piece, tensor, {piece.name: shard.to_local()}, rows[piece.name].start)
    return module


def _gather_together(unit: nn.Module, team: Team) -> None:
    hooks = unit._forward_pre_hooks
    for key, hook in hooks.items():

        def gather(*inputs: Any, hook: Callable[..., Any] = hook) -> Any:
            with team.exchange():
                return hook(*inputs)

        hooks[key] = gather


def _let_go(root: nn.Module, *_: object) -> None:
    """Reshard the units that a failed forward left gathered, which differ between ranks."""
    for unit in root.modules():
        if isinstance(unit, FSDPModule) and not _is_vector(unit):
            unit.reshard()


def _gather_vectors(team: Team, root: nn.Module, *_: object) -> None:
    """Gather the scales of norms, once: their layers are never called, so FSDP's hooks do not run."""
    vectors = [unit for unit in root.modules() if isinstance(unit, FSDPModule) and _is_vector(unit)]
    if vectors:
        with team.exchange():
            for unit in vectors:
                unit.unshard()


def _is_vector(unit: nn.Module) -> bool:
    return all(parameter.dim() == 1 for parameter in unit.parameters())


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The modules to shard, inner ones first: each block and the rest; in each, layers of another dtype by themselves:
    FSDP2 before torch 2.8 takes one dtype per unit."""
    blocks = list(module.get_submodule("blocks").children())
    for unit in [*blocks, module]:
        parts = [part for name, part in unit.named_modules() if unit is not module or not name.startswith("blocks.")]
        sizes: Counter[torch.dtype] = Counter()
        for part in parts:
            sizes.update({p.dtype: p.numel() for p in part.parameters(recurse=False)})
        main = max(sizes, key=sizes.__getitem__)
        for part in parts:
            if part is not unit and any(p.dtype != main for p in part.parameters(recurse=False)):
                yield part
        yield unit


def shard_rows(count: int, ranks: int, rank: int) -> slice:
    """The rows of `count` that FSDP2 puts on `rank`: equal shares rounded up, fewer or none on the last ranks."""
    share = -(-count // ranks)
    return slice(min(rank * share, count), min((rank + 1) * share, count))
