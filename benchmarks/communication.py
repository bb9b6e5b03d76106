"""Bytes that the ranks of a sequence group send in one forward, counted, beside the formula.

    python -m benchmarks.communication [--tokens 4096] [--dim 1024] [--layers 2]

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
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning.tensorfile import TensorStore
from wan.distributed.mesh import Layout, make_mesh
from wan.distributed.parallel import Parallel
from wan.distributed.plan import Network, sent_bytes
from wan.distributed.runtime import GLOO_REST, Runtime, Team
from wan.modules.model import Prompt, WanModel

LAYOUTS = [Layout(2, 2), Layout(4, 4), Layout(2, 1, 2), Layout(4, 2, 2)]
LIMIT = timedelta(minutes=5)


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends to others, by collective, at the level below every Python interface."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name in ("alltoall_base_", "_allgather_base_", "send"):
            if name == "send":
                self.counts[name] += sum(x.nbytes for x in args[0])
            else:
                out, sent = args[0], args[1]
                ranks = dist.get_world_size() if name == "alltoall_base_" else out.nbytes // max(1, sent.nbytes)
                self.counts[name] += sent.nbytes * (ranks - 1) // (ranks if name == "alltoall_base_" else 1)
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    pass
