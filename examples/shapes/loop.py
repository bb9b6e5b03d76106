"""What all stages of training share: processes that average gradients, optimisers, the mean of the weights, and a
state on disk from which an interrupted stage goes on with the same numbers.

Each process runs on one thread: two such processes keep two cores busier than one process with two threads.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SAVE_SECONDS = 60.0
MEAN = 0.05  # share of a stage's steps that the exponential mean of the weights looks back, which is what it hands on
WARM_UP = 100  # steps over which the learning rate rises


@dataclass(frozen=True)
class Peers:
    """The processes that train one network together."""

    rank: int = 0
    count: int = 1

    @classmethod
    def connect(cls, meeting: Path, rank: int, count: int) -> Peers:
        if count > 1:
            where = f"file://{meeting}"
            dist.init_process_group("gloo", where, timedelta(minutes=30), world_size=count, rank=rank)
        return cls(rank, count)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class Muon:
    """Momentum made orthogonal before it is applied (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A convolution's kernel counts as a matrix of output channels by all the rest. Matrices of one shape go in one batch.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(p)
        self.trace = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad.view(shape) for p in group])  # type: ignore[union-attr]  # called after backward
            trace = self.trace[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp_(trace, self.momentum))  # Nesterov's look ahead
            # entries then have the size 0.2, which is about what AdamW's have
            torch._foreach_add_([p.view(shape) for p in group], list(update), alpha=-rate * 0.2 * max(shape) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """Singular values of [..., m, n] to about 1, by five Newton-Schulz steps of degree five."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


class Optimiser:
    """Muon for the matrices named, AdamW for all other parameters."""

    def __init__(self, model: nn.Module, is_matrix: Callable[[str, nn.Parameter], bool]) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.muon = Muon(p for name, p in named if is_matrix(name, p))
        self.adam = torch.optim.AdamW(
            (p for name, p in named if not is_matrix(name, p)), betas=(0.9, 0.98), weight_decay=0
        )

    def step(self, rate: float, matrix_lead: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step(rate * matrix_lead)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "trace": list(self.muon.trace.values())}

    def restore(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for trace, kept in zip(self.muon.trace.values(), state["trace"], strict=True):
            trace.copy_(kept)


@dataclass
class Stage:
    """`steps` steps of `loss(step, generator)` on the trainable parameters of `model`."""

    name: str
    folder: Path
    model: nn.Module
    loss: Callable[[float, torch.Generator], Tensor]  # gets how far the stage is, 0 to 1
    steps: int
    rate: float
    peers: Peers = Peers()
    is_matrix: Callable[[str, nn.Parameter], bool] = lambda _name, _parameter: False  # what Muon is for
    matrix_lead: float = 1.0  # how much faster the matrices learn than the rest
    falls: bool = True  # whether the learning rate does towards the end

    def run(self) -> None:
        """Train, and leave the mean of the weights in the model."""
        optimiser = Optimiser(self.model, self.is_matrix)
        parameters = optimiser.parameters
        mean = [p.detach().clone() for p in parameters]
        done = self._restore(optimiser, mean)
        begun = saved = time.monotonic()
        recent: list[float] = []
        for step in range(done, self.steps):
            seed = zlib.crc32(f"{self.name} {step} {self.peers.rank}".encode())
            loss = self.loss(step / self.steps, torch.Generator().manual_seed(seed))
            loss.backward()
            self.peers.average_gradients(parameters)
            optimiser.step(self.rate * self._share(step), self.matrix_lead)
            with torch.no_grad():
                torch._foreach_lerp_(mean, parameters, max(1 / (MEAN * self.steps), 9 / (10 + step)))
            recent.append(loss.item())
            if step % 50 == 49 and self.peers.rank == 0:
                pace = (time.monotonic() - begun) / (step + 1 - done)
                print(
                    f"{self.name} step {step + 1}/{self.steps} loss {sum(recent) / len(recent):.4f} {pace:.3f} s/step",
                    flush=True,
                )
                recent.clear()
            if self.peers.rank == 0 and time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                self._save(step + 1, optimiser, mean)
        with torch.no_grad():
            torch._foreach_copy_(parameters, mean)

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.partial.pt"

    def _save(self, step: int, optimiser: Optimiser, mean: list[Tensor]) -> None:
        spare = self._file.with_suffix(".spare")
        weights = [p.detach() for p in optimiser.parameters]
        torch.save({"step": step, "weights": weights, "mean": mean, "optimiser": optimiser.state()}, spare)
        os.replace(spare, self._file)

    def _restore(self, optimiser: Optimiser, mean: list[Tensor]) -> int:
        if not self._file.exists():
            return 0
        kept = torch.load(self._file)
        with torch.no_grad():
            torch._foreach_copy_(optimiser.parameters, kept["weights"])
            torch._foreach_copy_(mean, kept["mean"])
        optimiser.restore(kept["optimiser"])
        return kept["step"]

    def _share(self, step: int) -> float:
        """Schedule of the learning rate: a linear rise, then half a cosine down to a fiftieth."""
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.falls else 1.0
        return min(1.0, (step + 1) / WARM_UP) * fall
