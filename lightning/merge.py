"""The deltas of all LoRAs of one expert, added to its weights one tensor at a time while they stream in.

    W' = W + sum over the LoRAs of strength * ((alpha / rank) * up @ down  or  diff)

Product and sum are float32 and rounded once, by whoever casts the result. The product is made in blocks of rows that
stay in the processor's cache, and into buffers that live on from call to call: a fresh 100 MB of memory for each
temporary costs several times the arithmetic. On a CPU the result is that of the plain expression, bit for bit.

Shapes: O rows of the weight, I columns (all further axes of a convolution flattened), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning.lora import Lora
from lightning.lora_matching import Delta
from wan.utils.accelerator import Accelerator

BLOCK_BYTES = 2 << 20  # of float32 product a thread at a time: about the second-level cache of one core


@dataclass(frozen=True)
class _Part:
    lora: Lora
    delta: Delta


class Merge:
    """What the LoRAs of one expert add to a model with parameters `shapes`; call it on each weight.

    Run `lightning.lora.check` on every LoRA first: here, tensors that match nothing are simply not used, and one with
    NaN or Inf is found when it is read (LoraError). The order of the LoRAs does not matter, to the bit.
    device: where to compute and to leave the results (default: the CPU).
    linear_pairs=False leaves the pairs on 2-D weights out, for a model that carries them as adapters.
    """

    def __init__(
        self,
        loras: Sequence[Lora],
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device | None = None,
        *,
        linear_pairs: bool = True,
    ) -> None:
        self.shapes = shapes
        self.device = device or torch.device("cpu")
        self.parts: dict[str, list[_Part]] = {}
        for lora in sorted(loras, key=lambda lora: (str(lora.path), lora.strength)):
            for delta in lora.deltas(shapes):
                if lora.strength and (linear_pairs or not delta.rank or len(shapes[delta.target]) != 2):
                    self.parts.setdefault(delta.target, []).append(_Part(lora, delta))
        self._buffers: dict[str, Tensor] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._downs: dict[tuple[Path, str], Tensor] = {}  # of one weight, whose rows come one share after the other
        self._downs_of = ""

    def touches(self, name: str) -> bool:
        return name in self.parts

    def __call__(self, name: str, weight: Tensor, rows: slice | None = None) -> Tensor:
        """`weight` (any dtype) plus its deltas, in float32 on the device; an untouched weight comes back as it is.

        rows: `weight` is only these rows of the parameter. The result may lie in a buffer, valid until the next call.
        """
        if name not in self.parts:
            return weight
        parts = self.parts[name]
        start, stop, _ = (rows or slice(None)).indices(self.shapes[name][0])
        if tuple(weight.shape) != (max(0, stop - start), *self.shapes[name][1:]):
            raise ValueError(f"{name}: rows {start}:{stop} of {list(self.shapes[name])} given as {list(weight.shape)}")
        if name != self._downs_of:
            self._downs, self._downs_of = {}, name
        terms = [self._load(part, slice(start, stop)) for part in parts]
        source = _matrix(weight)
        result = self._buffer("result", source.shape)
        step = self._rows_at_once(*source.shape)
        for top in range(0, len(source), step):
            block = slice(top, top + step)
            change = self._buffer("change", result[block].shape)
            terms[0].write(block, change)
            for term in terms[1:]:
                other = self._buffer("other", change.shape)
                term.write(block, other)
                change += other
            torch.add(source[block].to(self.device), change, out=result[block])
        return result.view(weight.shape)

    def _rows_at_once(self, rows: int, columns: int) -> int:
        """Blocks of nearly equal size: products of fewer than eight rows may be summed in another order."""
        if self.device.type != "cpu":
            return max(1, rows)  # an accelerator wants large products
        blocks = math.ceil(4 * rows * columns / (BLOCK_BYTES * torch.get_num_threads()))
        return max(16, math.ceil(rows / max(1, blocks)))

    def _buffer(self, use: str, shape: Sequence[int]) -> Tensor:
        """float32 memory for one use, kept and grown from call to call."""
        count = math.prod(shape)
        kept = self._buffers.get(use)
        if kept is None or kept.numel() < count:
            kept = self._buffers[use] = torch.empty(count, device=self.device)
        return kept[:count].view(*shape)

    def _load(self, part: _Part, rows: slice) -> _Term:
        """One delta's tensors (these rows of `up` or of the difference) in float32 on the device."""
        lora, delta = part.lora, part.delta
        up, down = self._read(lora, delta.tensors[0], rows), None
        if delta.rank:
            key = lora.path, delta.tensors[1]
            if key not in self._downs:
                self._downs[key] = self._read(lora, delta.tensors[1])
            down = self._downs[key]
        return _Term(up, down, delta.scale * lora.strength)

    def _read(self, lora: Lora, name: str, rows: slice | None = None) -> Tensor:
        """A GPU gets it from pinned memory, which is free again when this returns; on a CPU it stays where it is."""
        buffer = None
        if Accelerator(self.device).has_memory:
            size = lora.store.buffer_bytes(name, rows)
            if self._staging.numel() < size:
                self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            buffer = self._staging
        return _matrix(lora.read(name, rows, buffer)).to(self.device).float()


def _matrix(tensor: Tensor) -> Tensor:
    """All axes but the first flattened; a vector becomes a column."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


@dataclass(frozen=True)
class _Term:
    """factor * up @ down, or factor * up where there is no down. Shapes: up [O, R] or [O, I], down [R, I]."""

    up: Tensor
    down: Tensor | None
    factor: float

    def write(self, block: slice, out: Tensor) -> None:
        """Put rows `block` of the term into `out` [rows, I]."""
        if self.down is None:
            out.copy_(self.up[block])
        else:
            torch.mm(self.up[block], self.down, out=out)
        if self.factor != 1.0:
            out.mul_(self.factor)
