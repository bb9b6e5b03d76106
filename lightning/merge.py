"""The deltas of all LoRAs of one expert, added to its weights one tensor at a time while they stream in.

Product and sum are float32 and rounded once, by whoever casts the result. The product is made in blocks of rows that
stay in the processor's cache, in buffers that are kept from call to call: a fresh 100 MB of memory for each temporary
costs several times the arithmetic. On a CPU the result is that of the plain expression, bit for bit.
Shapes: O rows of the weight, I columns (all further axes of a convolution flattened), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning.lora import Lora
from lightning.lora_matching import PAIR, Delta, Shapes
from wan.utils.accelerator import Accelerator

BLOCK_BYTES = 2 << 20  # of float32 product a thread at a time: about the second-level cache of one core
BY_ROWS = {"up", "up_bias", "diff", "diff_b", "diff_m"}  # tensors with a row per row of the weight


class Merge:
    """The changes by the LoRAs of one expert to a model with parameters `shapes`; call it on each weight.

    Tensors that match nothing are not used: run `lightning.lora.check` first. The order of the LoRAs changes no bit.
    device: of computation and results. linear_pairs=False leaves out the pairs on 2-D weights, for adapters.
    """

    def __init__(
        self, loras: Sequence[Lora], shapes: Shapes, device: torch.device | None = None, *, linear_pairs: bool = True
    ) -> None:
        self.shapes = shapes
        self.device = device or torch.device("cpu")
        self.deltas: dict[str, list[tuple[Lora, Delta]]] = {}  # by parameter
        for lora in sorted(loras, key=lambda lora: (str(lora.path), lora.strength)):
            for delta in lora.deltas(shapes):
                if lora.strength and (linear_pairs or not delta.is_adapter):
                    self.deltas.setdefault(delta.target, []).append((lora, delta))
        self._buffers: dict[str, Tensor] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._kept: dict[tuple[Path, str], Tensor] = {}  # of one weight, whose rows come one share after the other
        self._kept_of = ""

    def free_buffers(self) -> None:
        """Give back the memory kept between calls; the next call takes it anew."""
        self._buffers, self._kept, self._kept_of = {}, {}, ""

    def touches(self, name: str) -> bool:
        return name in self.deltas

    def __call__(self, name: str, weight: Tensor, rows: slice | None = None) -> Tensor:
        """`weight` (any dtype) plus its deltas, in float32 on the device; an untouched weight comes back as it is.

        rows: `weight` is only these rows of the parameter. The result may lie in a buffer, valid until the next call.
        """
        if name not in self.deltas:
            return weight
        start, stop, _ = (rows or slice(None)).indices(self.shapes[name][0])
        if tuple(weight.shape) != (max(0, stop - start), *self.shapes[name][1:]):
            raise ValueError(f"{name}: rows {start}:{stop} of {list(self.shapes[name])} given as {list(weight.shape)}")
        if name != self._kept_of:
            self._kept, self._kept_of = {}, name
        terms = [self._term(lora, delta, slice(start, stop)) for lora, delta in self.deltas[name]]
        source = weight[:, None].flatten(1)  # of a vector one column
        result = self._buffer("result", source.shape)
        step = self._rows_at_once(*source.shape)
        for top in range(0, len(source), step):
            block = slice(top, min(top + step, len(source)))
            weight_rows = source[block].to(self.device)
            change = self._buffer("change", result[block].shape)
            terms[0](block, weight_rows, change)
            for term in terms[1:]:
                other = self._buffer("other", change.shape)
                term(block, weight_rows, other)
                change += other
            torch.add(weight_rows, change, out=result[block])
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

    def _term(self, lora: Lora, delta: Delta, rows: slice) -> Callable[[slice, Tensor, Tensor], None]:
        """Read one delta's tensors; only these rows of those that have the weight's rows.

        The result puts rows `block` of the delta, which are `weight` [rows, I] before the merge, into `out` [rows, I].
        """
        tensors = {
            role: self._read(lora, name, rows)[:, None].flatten(1) if role in BY_ROWS else self._read(lora, name)
            for role, name in zip(delta.roles, delta.tensors, strict=True)
        }
        change = delta.kind.change(tensors) if delta.kind and delta.kind is not PAIR else None
        norms = self._read(lora, delta.magnitude).flatten()[rows, None] if delta.magnitude else None
        factor = delta.scale if delta.magnitude else delta.scale * lora.strength

        def write(block: slice, weight: Tensor, out: Tensor) -> None:
            if change:
                out.copy_(change(slice(rows.start + block.start, rows.start + block.stop)))
            elif "up" in tensors:
                torch.mm(tensors["up"][block], tensors["down"].flatten(1), out=out)
            else:
                (diff,) = tensors.values()
                out.copy_(diff[block])
            if factor != 1.0:
                out.mul_(factor)
            if norms is not None:
                out += weight
                out *= norms[block] / out.norm(dim=1, keepdim=True)
                out -= weight
                out *= lora.strength

        return write

    def _read(self, lora: Lora, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, kept until the next weight, or these rows of it; float32 on the device.

        A GPU gets it from pinned memory, which is free again when this returns; on a CPU it stays where it is.
        """
        if rows is None and (lora.path, name) in self._kept:
            return self._kept[lora.path, name]
        buffer = None
        if Accelerator(self.device).has_memory:
            size = lora.store[name].rows(rows).bytes
            if self._staging.numel() < size:
                self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            buffer = self._staging
        tensor = lora.read(name, rows, buffer).to(self.device).float()
        if rows is None:
            self._kept[lora.path, name] = tensor
        return tensor
