"""Bytes that the ranks of a sequence group send in one forward, counted, beside the formula.

    python -m benchmarks.communication [--tokens 512] [--dim 1024] [--layers 2]

Runs on CPUs over gloo: what is counted does not depend on the device. Two bytes an element, as on a GPU.
Ulysses sends 4 / P of a token tensor a block and rank, less what a rank keeps itself: q, k, v and the result.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Row, report
from wan.checkpoints.safetensors_file import TensorStore
from wan.distributed.fsdp import load_sharded
from wan.distributed.mesh import Layout, make_mesh
from wan.distributed.ulysses import split_tokens
from wan.modules.model import Prompt, WanModel
from wan.offload.reader import Source
from wan.planning.time_estimate import NetworkSizes, sent_bytes

LAYOUTS = [Layout(2, 2), Layout(4, 4), Layout(2, 1, 2), Layout(4, 2, 2)]
LIMIT = timedelta(minutes=5)


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends to others, by purpose, below every Python interface to the collectives."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._overloadpacket.__name__ if func.namespace == "c10d" else ""
        if name == "alltoall_base_":
            self.counts["ulysses"] += args[1].nbytes * (self.layout.ulysses - 1) // self.layout.ulysses
        elif name == "send":
            self.counts["ring"] += sum(x.nbytes for x in args[0])
        elif name == "_allgather_base_":
            # FSDP gathers flat byte buffers, the result's tokens are rows of numbers
            self.counts["weights" if args[1].ndim == 1 else "result"] += args[0].nbytes - args[1].nbytes
        return func(*args, **(kwargs or {}))


def count(layout: Layout, rank: int, network: NetworkSizes, tokens: int, file: Path | None) -> Counter[str]:
    """Bytes that `rank` sends in one forward of a network of zeros; sharded if its weights are in a `file`."""
    device = torch.device("cpu")
    mesh = make_mesh(layout, "cpu", rank)
    with torch.device("meta"):
        model = model_of(network)
    if file:
        model = load_sharded(model, Source(TensorStore.open(file), lambda _: torch.bfloat16), mesh, device)
    else:
        model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    split_tokens(model, mesh)
    latent, prompt = torch.zeros(16, 1, 2, 2 * tokens), Prompt(torch.zeros(1, 32))
    with torch.no_grad(), SentBytes(layout) as sent:
        model(latent, 500.0, prompt)
    return sent.counts


def model_of(network: NetworkSizes) -> WanModel:
    sizes = {name: getattr(network, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers")}
    return WanModel(**sizes, in_dim=16, out_dim=16, text_dim=32, text_len=32)


def count_everywhere(
    layout: Layout, network: NetworkSizes, tokens: int, file: Path | None = None
) -> list[Counter[str]]:
    """`count` of every rank, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (Path(folder), layout, network, tokens, file), nprocs=layout.world)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(layout.world)]


def _rank(rank: int, folder: Path, layout: Layout, network: NetworkSizes, tokens: int, file: Path | None) -> None:
    torch.set_num_threads(1)
    meet = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=layout.world, timeout=LIMIT)
    torch.save(count(layout, rank, network, tokens, file), folder / str(rank))
    dist.barrier()
    os._exit(0)  # not through the interpreter's end, where gloo's threads may abort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 512), ("dim", 1024), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    report(rows(given.tokens, given.dim, given.layers))


def rows(tokens: int = 512, dim: int = 1024, layers: int = 2) -> list[Row]:
    network = NetworkSizes(dim, 2 * dim, 8, layers)
    where = f"MB a rank sends in a forward of {tokens} tokens, width {dim}, {layers} blocks, bf16: "
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        model = model_of(network).to(torch.bfloat16)
        save_file({name: torch.zeros_like(p) for name, p in model.named_parameters()}, file)
        size = sum(p.nbytes for p in model.parameters())
        for layout, shards in [*((layout, None) for layout in LAYOUTS), (Layout(4, 4), file)]:
            formula = sent_bytes(layout, network, tokens, 2, size if shards else 0)
            counts = count_everywhere(layout, network, tokens, shards)
            counted = {purpose: max(rank[purpose] for rank in counts) for purpose in (*formula, "result")}
            figure, expected = (
                ", ".join(f"{purpose} {amount / 1e6:.3f}" for purpose, amount in sizes.items() if amount)
                for sizes in (counted, formula)
            )
            found.append(Row(f"{where}{layout}{', weights sharded' if shards else ''}", figure, f"formula: {expected}"))
    return found


if __name__ == "__main__":
    main()
