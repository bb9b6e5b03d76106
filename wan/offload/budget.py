"""Slots of a device: how many fit beside the work of each stage, and which block is in which slot when.

A block is a group of weights that is used together. A use is one block at work in one forward; a job's steps give the
list of its uses. A slot holds one block. While a block is at work, those of the next `ahead` uses are in their slots or
on their way. Belady's rule evicts the block whose next use is farthest ahead, which loads least.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from wan.offload.reader import PIECE_BYTES

AHEAD = 2  # uses; 1 would do if every read took as long as the last
# Blocks that wait beside decoding leave this multiple of its predicted peak, of which 1.24 to 1.28 was reserved.
BESIDE_DECODING = 1.35
LEAST_SLOTS = 2  # with one, every read waits for the block before it
TRANSIT_BYTES = 6 * PIECE_BYTES  # a piece on its way: as float32, its product with the LoRAs, and their sum
MARGIN = 0.02  # of the free memory: rounding of allocations
FLOOR_BYTES = 500_000_000  # of the free memory at least, else the allocator often fails, returns memory and tries again
POOLS_BYTES = 256 << 20  # unused memory that PyTorch's allocator holds at a peak; each of two streams has a pool


@dataclass(frozen=True)
class Sizes:
    """One network's weights. block_bytes: of the largest block; resident: bytes that are in no block."""

    blocks: int
    block_bytes: int
    resident: int


@dataclass(frozen=True)
class Budget:
    """How a run uses a device. Bytes; `stages`: the peak of each stage by part."""

    free: int
    slots: int
    text_slots: int
    experts: dict[str, Sizes]
    stages: dict[str, dict[str, int]]
    keep: bool = False  # everything stays, as `--offload_model False` asks
    tiles: tuple[int, int] = (1, 1)  # in which a frame is decoded
    batch_guidance: bool = False  # a block does both passes of a guided step before the next block begins
    vae_leaves: bool = False  # the VAE's weights make room for blocks, and are read again to decode
    between: int = 0  # slots that fit beside decoding, for the first blocks of the next video
    source: str = "free"  # or "limit", of `--vram`

    @property
    def peaks(self) -> dict[str, int]:
        return {stage: sum(parts.values()) for stage, parts in self.stages.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def resident(self) -> bool:
        return self.slots >= sum(sizes.blocks for sizes in self.experts.values())

    @property
    def problem(self) -> str | None:
        """Why the run does not fit, and which flags help."""
        if self.peak <= self.free:
            return None
        stage = max(self.peaks, key=self.peaks.__getitem__)
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in self.stages[stage].items())
        there = f"{self.free / 1e9:.1f} GB are free" if self.source == "free" else f"--vram is {self.free / 1e9:.1f} GB"
        smaller = "a smaller --size or fewer frames"
        flags = {"decode": f"--vae_tiling, {smaller}", "text": "--t5_cpu"}.get(stage, smaller)
        flags = "--offload_model True" if self.keep else flags
        return f"{stage} needs at least {self.peak / 1e9:.1f} GB of the device ({parts}), {there}: use {flags}"

    def line(self, name: str = "GPU") -> str:
        """`GPU 24.0 GB free: high and low expert: 22 of 41 blocks stay, ...; peaks in GB: denoise 23.5, decode 8.0`"""
        by_text: dict[str, list[str]] = {}
        for expert, sizes in self.experts.items():
            by_text.setdefault(self._placement(sizes), []).append(expert)
        lines = [f"{' and '.join(experts)} expert: {text}" for text, experts in by_text.items()]
        if self.text_slots:
            lines.append(f"text encoder passes through {self.text_slots} slots")
        if self.batch_guidance:
            lines.append("each block serves both passes of a step")
        if self.tiles != (1, 1):
            lines.append(f"decoding in {self.tiles[0]}x{self.tiles[1]} tiles")
        peaks = ", ".join(f"{stage} {size / 1e9:.1f}" for stage, size in self.peaks.items())
        return f"{name} {self.free / 1e9:.1f} GB {self.source}: {'; '.join(lines)}; peaks in GB: {peaks}"

    def staying(self, sizes: Sizes) -> int:
        """Blocks of an expert that keep their slots while it runs; the rest pass through the other slots."""
        return sizes.blocks if self.slots >= sizes.blocks else self.slots - min(AHEAD, self.slots - 1) - 1

    def _placement(self, sizes: Sizes) -> str:
        if self.resident:
            return "all blocks stay"
        if self.slots >= sizes.blocks:
            return f"all {sizes.blocks} blocks stay while it runs, then their slots go to the next"
        stay = self.staying(sizes)
        return f"{stay} of {sizes.blocks} blocks stay, {sizes.blocks - stay} pass through {self.slots - stay} slots"


def usable_bytes(free: int) -> int:
    """The part of the free bytes that tensors may take."""
    return free - max(int(free * MARGIN), FLOOR_BYTES) - POOLS_BYTES


def fit(
    free: int,
    experts: Mapping[str, Sizes],
    text: Sizes | None,
    *,
    activations: int,
    decode: int,
    text_work: int = 0,
    keep: bool = False,
    tiles: tuple[int, int] = (1, 1),
    image: int = 0,
    second_pass: int = 0,
    vae: int = 0,
    vae_stays: bool = False,
) -> Budget:
    """The budget with as many slots as fit, at least `LEAST_SLOTS`. All in bytes.

    free: of the device, or `--vram`. activations, decode, image: what a forward, decoding and encoding an image need
    beside weights; text_work: the encoder. text: None if that runs elsewhere. keep: everything stays (`--offload_model
    False`). vae: its weights; where blocks stream, they leave while denoising unless vae_stays. second_pass: what it
    takes more if both passes of a guided step go through the blocks together; 0: none is guided. They do where blocks
    stream: each then comes once a step, which saves more than the slots that it costs.
    """
    total = sum(sizes.blocks for sizes in experts.values())
    resident = sum(sizes.resident for sizes in experts.values())
    slot_bytes = max(sizes.block_bytes for sizes in experts.values())
    usable = usable_bytes(free) - resident - TRANSIT_BYTES

    def slots_beside(work: int) -> int:
        return total if keep else min(total, (usable - work) // slot_bytes)

    streams = slots_beside(activations + vae) < max(sizes.blocks for sizes in experts.values())
    vae_leaves = streams and not vae_stays
    vae_there = 0 if vae_leaves else vae
    batch_guidance = streams and second_pass > 0 and slots_beside(activations + second_pass + vae_there) >= LEAST_SLOTS
    activations += second_pass if batch_guidance else 0
    slots = max(LEAST_SLOTS, slots_beside(activations + vae_there))
    stages = {
        "denoise": {
            "blocks": slots * slot_bytes, "other weights": resident + vae_there, "in transit": TRANSIT_BYTES,
            "work": activations,
        },
        "decode": {"other weights": resident + vae, "blocks": slots * slot_bytes if keep else 0, "work": decode},
    }  # fmt: skip
    if image:
        stages["image"] = {**stages["decode"], "work": image}
    text_slots = (text.blocks if keep else min(AHEAD + 1, text.blocks)) if text else 0
    if text:
        stages["text"] = {
            "blocks": text_slots * text.block_bytes, "other weights": text.resident, "work": TRANSIT_BYTES + text_work,
        }  # fmt: skip
    return Budget(
        free, slots, text_slots, dict(experts), stages, keep, tiles, batch_guidance, vae_leaves,
        between=max(0, min(slots, slots_beside(vae + int(BESIDE_DECODING * max(decode, image))))),
    )  # fmt: skip


@dataclass(frozen=True)
class Move:
    """Bring `block` into `slot` for use number `use`, as soon as the first `after` uses are over."""

    block: int
    slot: int
    use: int
    after: int


@dataclass
class _Stay:
    slot: int
    after: int = 0  # uses that must be over before the slot may be written again


def schedule(
    uses: Sequence[int], slots: int, held: Mapping[int, int] | None = None, *, again: bool = True, ahead: int = AHEAD
) -> list[Move]:
    """The moves of one job, in the order in which they are needed.
    held: block -> slot at the start. again: a job with the same uses follows, so its first blocks are worth keeping."""
    ahead = min(ahead, slots - 1)
    uses_of: dict[int, list[int]] = {}
    for index, block in enumerate(uses):
        uses_of.setdefault(block, []).append(index)

    def next_use(block: int, start: int) -> float:
        known = uses_of.get(block, [])
        index = bisect_left(known, start)
        if index < len(known):
            return known[index]
        return known[0] + len(uses) if known and again else math.inf

    here = {block: _Stay(slot) for block, slot in (held or {}).items()}
    over = [_Stay(slot) for slot in sorted(set(range(slots)) - {stay.slot for stay in here.values()})]
    brought: list[tuple[int, _Stay]] = []
    for index, block in enumerate(uses):
        if block not in here:
            if len(here) == slots:
                over.append(here.pop(max(here, key=partial(next_use, start=max(0, index - ahead)))))
            here[block] = _Stay(-1)
            brought.append((index, here[block]))
        here[block].after = index + 1
    # Each takes the slot that is free first, whoever was evicted for it: reads start earlier. Sorted, the k-th slot is
    # free in time for the k-th load because any k of them were.
    over.sort(key=lambda stay: stay.after)
    moves = []
    for (index, stay), evicted in zip(brought, over, strict=False):
        stay.slot = evicted.slot
        moves.append(Move(uses[index], stay.slot, index, evicted.after))
    return moves
