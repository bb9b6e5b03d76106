"""What fits on a device: from free bytes and sizes to the number of slots, the peak by part, and the plan's line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wan.offload.eviction import AHEAD
from wan.offload.reader import PIECE_BYTES

# Of the predicted peak of decoding, where blocks lie beside it: counted reserved 1.24 to 1.28 of what was allocated. A
# run that is short of a few blocks there loses nothing, one that fails to get memory stops to give back what is unused.
BESIDE_DECODING = 1.35
LEAST_SLOTS = 2  # with one, every read waits for the block before it
# A piece on its way through a device: as float32 (a file may hold bf16), its product with the LoRAs, and their sum.
TRANSIT_BYTES = 6 * PIECE_BYTES
MARGIN = 0.02  # of the free memory: rounding of allocations
POOLS_BYTES = 256 << 20  # what PyTorch's allocator holds unused at a peak; it has a pool for each of two streams


@dataclass(frozen=True)
class Sizes:
    """One network's weights as they lie on the device. unit_bytes: the largest unit's; fixed: what is in no unit."""

    units: int
    unit_bytes: int
    fixed: int


@dataclass(frozen=True)
class Budget:
    """How a run uses a device. Bytes; `stages`: the peak of each stage by part."""

    free: int
    slots: int
    text_slots: int
    experts: dict[str, Sizes]
    stages: dict[str, dict[str, int]]
    keep: bool = False  # everything stays because it was asked for
    tiles: tuple[int, int] = (1, 1)  # in which a frame is decoded
    batch_guidance: bool = False  # a block does both passes of a guided step before the next block begins
    vae_leaves: bool = False  # the VAE's weights make room for blocks, and are read again to decode
    between: int = 0  # slots that there is room for beside decoding, for what the next video begins with

    @property
    def peaks(self) -> dict[str, int]:
        return {stage: sum(parts.values()) for stage, parts in self.stages.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def resident(self) -> bool:
        return self.slots >= sum(sizes.units for sizes in self.experts.values())

    @property
    def problem(self) -> str | None:
        """Why the run does not fit, and what would; None if it does."""
        if self.peak <= self.free:
            return None
        stage = max(self.peaks, key=self.peaks.__getitem__)
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in self.stages[stage].items())
        helps = {"decode": "--vae_tiling, a smaller --size or fewer frames", "text": "--t5_cpu"}
        if self.keep:
            helps = dict.fromkeys(self.stages, "--offload_model True")
        return (
            f"{stage} needs at least {self.peak / 1e9:.1f} GB of the device ({parts}), {self.free / 1e9:.1f} GB are "
            f"free: use {helps.get(stage, 'a smaller --size or fewer frames')}"
        )

    def line(self, name: str = "GPU") -> str:
        """`GPU 24.0 GB free: high and low expert: 22 of 41 parts stay, ...; peaks in GB: denoise 23.5, decode 8.0`"""
        parts = [f"{expert} expert: {self._place(sizes)}" for expert, sizes in self.experts.items()]
        if len(set(map(self._place, self.experts.values()))) == 1:
            parts = [f"{' and '.join(self.experts)} expert: {self._place(next(iter(self.experts.values())))}"]
        if self.text_slots:
            parts.append(f"text encoder passes through {self.text_slots} slots")
        if self.batch_guidance:
            parts.append("each part serves both passes of a step")
        if self.tiles != (1, 1):
            parts.append(f"decoding in {self.tiles[0]}x{self.tiles[1]} tiles")
        peaks = ", ".join(f"{stage} {size / 1e9:.1f}" for stage, size in self.peaks.items())
        return f"{name} {self.free / 1e9:.1f} GB free: {'; '.join(parts)}; peaks in GB: {peaks}"

    def staying(self, sizes: Sizes) -> int:
        """Units of an expert that keep their slots while it is at work; the rest pass through the others."""
        return sizes.units if self.slots >= sizes.units else self.slots - min(AHEAD, self.slots - 1) - 1

    def _place(self, sizes: Sizes) -> str:
        """Slots serve one expert at a time; the last step of one hands them to the next. A part: mostly a block."""
        if self.resident:
            return "all parts stay"
        if self.slots >= sizes.units:
            return f"all {sizes.units} parts stay while it is at work, then their slots go to the next"
        stay = self.staying(sizes)
        through = self.slots - stay
        return f"{stay} of {sizes.units} parts stay, {sizes.units - stay} pass through {through} slots"


def fit(
    free: int,
    experts: Mapping[str, Sizes],
    text: Sizes | None,
    *,
    activations: int,
    decode: int,
    text_slots: int = AHEAD + 1,
    keep: bool = False,
    tiles: tuple[int, int] = (1, 1),
    image: int = 0,
    second_pass: int = 0,
    vae: int = 0,
    vae_stays: bool = False,
) -> Budget:
    """As many slots as there is room for, at least `LEAST_SLOTS`; ask the result for its `problem`.

    vae: its weights. Where parts pass through they leave for the denoising, unless vae_stays.

    second_pass: what both passes of a guided step need more if they go through the blocks together; 0: none is guided.
    They do so where parts pass through, which then come once a step: that is worth more than the slots it takes.

    free: bytes of the device that the run may use, or `--vram`. activations, decode, image: what a forward, decoding
    and encoding an image need beside weights. text: None if the encoder runs elsewhere. keep: everything is to stay
    (`--offload_model False`).
    """
    total = sum(sizes.units for sizes in experts.values())
    fixed = sum(sizes.fixed for sizes in experts.values())
    slot_bytes = max(sizes.unit_bytes for sizes in experts.values())
    usable = int(free * (1 - MARGIN)) - fixed - TRANSIT_BYTES - POOLS_BYTES

    def slots_beside(work: int) -> int:
        return total if keep else min(total, (usable - work) // slot_bytes)

    passing = slots_beside(activations + vae) < max(sizes.units for sizes in experts.values())
    vae_leaves = passing and not vae_stays
    staying = fixed if vae_leaves else fixed + vae
    slots = max(LEAST_SLOTS, slots_beside(activations + staying - fixed))
    batch_guidance = (
        passing and second_pass > 0 and slots_beside(activations + second_pass + staying - fixed) >= LEAST_SLOTS
    )
    if batch_guidance:
        activations += second_pass
        slots = slots_beside(activations + staying - fixed)
    stages = {
        "denoise": {
            "blocks": slots * slot_bytes, "other weights": staying, "in transit": TRANSIT_BYTES, "work": activations,
        },
        "decode": {"other weights": fixed + vae, "blocks": slots * slot_bytes if keep else 0, "work": decode},
    }  # fmt: skip
    if image:
        stages["image"] = {**stages["decode"], "work": image}
    if text is not None:
        text_slots = text.units if keep else min(text_slots, text.units)
        stages["text"] = {"blocks": text_slots * text.unit_bytes, "other weights": text.fixed, "work": TRANSIT_BYTES}
    return Budget(
        free, slots, 0 if text is None else text_slots, dict(experts), stages, keep, tiles, batch_guidance, vae_leaves,
        between=max(0, min(slots, slots_beside(vae + int(BESIDE_DECODING * max(decode, image))))),
    )  # fmt: skip
