"""The plan of a run: what was opened and decided before any weight is read. `plan_report.py` prints what runs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from lightning.lora import Coverage, Lora
from wan.checkpoints.checkpoint import OpenCheckpoint
from wan.cli.options import OPTIONS, VIDEO, Request
from wan.configs import TaskConfig
from wan.configs.task import PATCH
from wan.distributed.mesh import Layout
from wan.distributed.ulysses import exchange_bytes
from wan.distributed.vae_parallel import decode_peak, encode_peak
from wan.jobs.job import Job, Sampling
from wan.media.images import digest
from wan.modules.attention import QUANTISED
from wan.modules.fp8 import working_bytes
from wan.offload.budget import MARGIN, POOLS_BYTES, Budget, Sizes, fit
from wan.offload.networks import sizes_of
from wan.offload.reader import parameter_dtypes
from wan.sampling import Step

TILES = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))  # rows and columns in which a frame is decoded
LATENTS = 4  # of a video's size are alive: the noise, the sample, an image's, a forward's input or result
DECODING = 1.1  # of the predicted peak: what is allocated and freed in so many sizes leaves gaps


@dataclass(frozen=True)
class Plan:
    """What the run will do, as printed before it starts, as kept in every record, and as the pipeline takes it."""

    request: Request
    config: TaskConfig
    checkpoint: OpenCheckpoint
    device: torch.device
    text_device: torch.device
    noise_device: torch.device
    dtype: torch.dtype  # of the transformer
    text_dtype: torch.dtype
    attention: str
    layout: Layout
    loras: dict[str, list[Lora]]  # by expert
    lora_mode: str
    offload: bool  # the device holds what there is room for, and the rest is read when it is needed
    room: int | None = None  # bytes of the device that the run may use; None: not limited, or not known
    coverage: dict[str, list[Coverage]] = field(default_factory=dict)  # by expert
    fingerprints: dict[str, str] = field(default_factory=dict)  # file -> SHA-256 of its size and ends
    weight_bytes: dict[str, int] = field(default_factory=dict)  # as they lie in memory, by network
    sampling: Sampling | None = None
    steps: tuple[Step, ...] = ()
    jobs: tuple[Job, ...] = ()
    preset: str | None = None
    warnings: tuple[str, ...] = ()

    def tokens(self, size: tuple[int, int], frames: int) -> int:
        """Tokens of the transformer for one video of `size` (width, height)."""
        _, length, rows, columns = self.config.latent_shape(size, frames)
        return length * (rows // PATCH[1]) * (columns // PATCH[2])

    def place(self, job: Job) -> str:
        """The job's number, and its place among this process's videos: "0006 (3 of 500)"."""
        place = bisect_right(self.jobs, job.index, key=lambda other: other.index)
        return f"{job.number} ({place} of {len(self.jobs)})"

    def largest(self) -> Job:
        return max(self.jobs, key=lambda job: self.tokens(job.size, job.frame_num))

    def prompts(self) -> int:
        """Texts that the transformer attends to."""
        return 2 if any(step.guided for step in self.steps) else 1

    def budget(self, size: tuple[int, int], frames: int, prompts: int) -> Budget | None:
        """How the networks share the device's room for a video of `size` (width, height); None where nothing streams.

        prompts: texts that the transformer attends to, one or, where steps are guided, two.
        """
        checkpoint, request, ranks = self.checkpoint, self.request, self.layout.sequence
        if self.room is None or request.dit_fsdp:
            return None
        experts = self._expert_sizes()
        text = sizes_of(checkpoint.text_encoder.module, lambda _: self.text_dtype)
        model = next(iter(checkpoint.experts.values())).module
        width = model.num_heads * model.head_width
        tokens = -(-self.tokens(size, frames) // ranks)
        # the residual stream; queries, keys, values, their result
        work = tokens * width * (4 + 4 * self.dtype.itemsize)
        work += tokens * width * QUANTISED.get(self.attention, 0)
        work += 4 * tokens * model.head_width  # the table of rotations
        work += exchange_bytes(self.layout, tokens, width, self.dtype.itemsize)
        if self.lora_mode == "adapter" and self.loras:
            work += 2 * tokens * width * self.dtype.itemsize  # an adapter's result and its sum with the layer's
        work += working_bytes(model, self.dtype)
        work += prompts * 2 * len(model.blocks) * model.text_len * width * self.dtype.itemsize  # what is kept of texts
        shape = self.config.latent_shape(size, frames)
        vae, tiles = self.checkpoint.vae.module, self.tiles(shape)
        image = encode_peak(vae, shape[1:], ranks, self.encode_tiles(shape)) if self.config.mask_channels else 0
        latents = LATENTS * math.prod(shape) * torch.float32.itemsize
        if request.preview_steps:  # one frame is decoded between two steps, where a forward's activations are gone
            work = max(work, decode_peak(vae, (shape[0], 1, *shape[2:]), ranks, tiles=tiles))
        return fit(
            self.room, experts,
            text if self.text_device == self.device and not request.t5_fsdp else None, activations=work + latents,
            decode=decode_peak(vae, shape, ranks, tiles=tiles) + latents, tiles=tiles, keep=not self.offload,
            image=image and image + latents,
            second_pass=4 * tokens * width if prompts > 1 else 0, vae=self.weight_bytes["VAE"],
            vae_stays=request.preview_steps,
        )  # fmt: skip

    def tiles(self, latent: Sequence[int], finer: bool = False) -> tuple[int, int]:
        """Rows and columns in which the frames of a `latent` [C, f, h, w] are decoded, or each process's share of them:
        no more than the room asks for.

        finer: the next more, for a device that has less room than was thought.
        """
        vae, (channels, length, height, width) = self.checkpoint.vae.module, latent
        shape, ranks = (channels, length, height, width), self.layout.sequence
        first = int(self.request.vae_tiling)
        return self._tiles(latent, lambda tiles: decode_peak(vae, shape, ranks, tiles=tiles), first, finer)

    def encode_tiles(self, latent: Sequence[int]) -> tuple[int, int]:
        """The same for the image that becomes channels beside a `latent`."""
        vae, (length, height, width) = self.checkpoint.vae.module, latent[1:]
        return self._tiles(latent, lambda tiles: encode_peak(vae, (length, height, width), self.layout.sequence, tiles))

    def _tiles(
        self, latent: Sequence[int], peak: Callable[[tuple[int, int]], int], first: int = 0, finer: bool = False
    ) -> tuple[int, int]:
        ways = [tiles for tiles in TILES[first:] if tiles[0] <= latent[2] and tiles[1] <= latent[3]] or [TILES[0]]
        chosen = 0
        if self.room is not None and not self.request.dit_fsdp:
            room = (self.room - self.weight_bytes["VAE"]) * (1 - MARGIN) - POOLS_BYTES - self._beside_decoding()
            fitting = (index for index, tiles in enumerate(ways) if DECODING * peak(tiles) <= room)
            chosen = next(fitting, len(ways) - 1)
        return ways[min(chosen + finer, len(ways) - 1)]

    def _beside_decoding(self) -> int:
        """Bytes of the experts that are on the device while it decodes."""
        return sum(
            sizes.resident if self.offload else sizes.resident + sizes.blocks * sizes.block_bytes
            for sizes in self._expert_sizes().values()
        )

    def _expert_sizes(self) -> dict[str, Sizes]:
        sizes = {
            name: sizes_of(part.module, parameter_dtypes(self.dtype, self.request.convert_model_dtype, part.module))
            for name, part in self.checkpoint.experts.items()
        }
        return {name: replace(each, resident=each.resident + self._adapter_bytes(name)) for name, each in sizes.items()}

    def _adapter_bytes(self, expert: str) -> int:
        """Of an expert's LoRAs that stay beside its weights."""
        if self.lora_mode == "merge":
            return 0
        shapes = self.checkpoint.experts[expert].weights.shapes
        pairs = [
            (lora, delta.tensors)
            for lora in self.loras.get(expert, [])
            for delta in lora.deltas(shapes)
            if delta.rank and len(shapes[delta.target]) == 2
        ]
        return sum(math.prod(lora.store[name].shape) for lora, names in pairs for name in names) * self.dtype.itemsize

    def meaning(self, job: Job) -> dict[str, Any]:
        """What every option with a say in the video comes to for this job: equal meanings make equal videos.

        An option that stands for another one (a prompt file, `--seconds`) is told by that one's value.
        """
        assert self.sampling is not None, "a plan with jobs has a sampling"
        sampling = self.sampling
        comes_to = {
            "prompt": job.prompt, "negative_prompt": job.negative_prompt,
            **{name: path and digest(path) for name, path in job.pictures.items()},
            "size": list(job.size), "frame_num": job.frame_num, "base_seed": job.seed,
            "ckpt_dir": self._weights(), "lora_alpha": None, "lora_mode": self.lora_mode if self.loras else None,
            "sample_solver": sampling.solver, "sample_steps": [asdict(step) for step in self.steps],
            "sample_shift": None, "sample_guide_scale": None, "timesteps": None, "high_steps": None,
            "noise_device": self.noise_device.type, "device": self.device.type, "dtype": dtype_name(self.dtype),
        }  # fmt: skip
        told = {name: getattr(self.request, name) for name, row in OPTIONS.items() if row.scope is VIDEO}
        told |= comes_to
        return {name: value for name, value in told.items() if not OPTIONS[name].into}

    def _weights(self) -> dict[str, Any]:
        """What the weights are, by their contents: where the files lie does not count."""
        found = self.checkpoint.weight_files()
        parts: dict[str, Any] = {name: [self.fingerprints[str(f)] for f in files] for name, files in found.items()}
        for expert, loras in self.loras.items():
            parts[f"{expert} LoRAs"] = [
                [*(self.fingerprints[str(file)] for file in lora.store.files), lora.strength, lora.assumed_alpha]
                for lora in loras
            ]
        return parts


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
