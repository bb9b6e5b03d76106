"""The plan of a run as data: what was opened and decided before any weight is read. `report.py` prints it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from lightning.lora import Coverage, Lora
from wan.checkpoints.checkpoint import OpenCheckpoint
from wan.cli.options import OPTIONS, VIDEO, Request
from wan.configs import TaskConfig
from wan.distributed.mesh import Layout
from wan.jobs.job import Job, Sampling, prompts_by_window, windows_of
from wan.media.images import digest
from wan.modules.model import WanModel
from wan.modules.quantised_linear import working_bytes
from wan.offload.budget import Budget, Sizes
from wan.offload.networks import sizes_of
from wan.offload.reader import parameter_dtypes
from wan.sampling import Step, Video

Size = tuple[int, int]  # width, height
VideoKind = tuple[Size, int, bool, bool]  # size, frames, with an image, from a clip: decides memory and time of a video


@dataclass(frozen=True)
class VideoPlan:
    """Facts of all videos of one kind. Latents are [C, f, h, w], tiles (rows, columns) of a frame.
    encoded: the latent that an image or a clip becomes before the first step. budget: None for sharded experts."""

    latent: tuple[int, int, int, int]
    tokens: int  # of the transformer
    encoded: tuple[int, int, int, int] | None
    tiles: tuple[int, int]
    encode_tiles: tuple[int, int]
    first_step: int = 0  # of the plan's, that is run
    windows: Sequence[tuple[int, int]] = ()  # see `windows_of`; `tokens` are one's
    budget: Budget | None = None


@dataclass(frozen=True)
class Plan:
    """The run's decisions: printed before it starts, kept in every record, followed by the pipeline."""

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
    offload: bool  # the device holds as many blocks as fit; the others are read when they are needed
    room: int | None = None  # bytes of the device that the run may use; None: no limit, or none known
    coverage: dict[str, list[Coverage]] = field(default_factory=dict)  # by expert
    fingerprints: dict[str, str] = field(default_factory=dict)  # file -> SHA-256 of its size and ends
    sampling: Sampling | None = None
    steps: tuple[Step, ...] = ()
    text_lengths: tuple[int, ...] = ()  # tokens, of the longest texts that are encoded together
    videos: Mapping[VideoKind, VideoPlan] = field(default_factory=dict)
    jobs: tuple[Job, ...] = ()
    preset: str | None = None
    warnings: tuple[str, ...] = ()
    variants: Mapping[int, Plan] = field(default_factory=dict)  # by `Job.variant`, where jobs differ in their settings

    def of(self, job: Job | Video) -> Plan:
        """The plan with the settings of `job`."""
        return self.variants.get(job.variant, self) if isinstance(job, Job) else self

    @cached_property
    def guided(self) -> bool:
        """Whether any step has an unconditional pass."""
        return any(step.guided for step in self.steps)

    def _dtype_of(self, expert: WanModel) -> Callable[[str], torch.dtype]:
        return parameter_dtypes(self.dtype, self.request.convert_model_dtype, expert)

    @cached_property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes in memory, by network."""
        sizes = {}
        for name, part in self.checkpoint.experts.items():
            dtype_of = self._dtype_of(part.module)
            sizes[f"{name} expert"] = sum(p.numel() * dtype_of(n).itemsize for n, p in part.module.named_parameters())
        text = sum(p.numel() for p in self.checkpoint.text_encoder.module.parameters())
        sizes["text encoder"] = text * self.text_dtype.itemsize
        return sizes | {"VAE": sum(p.nbytes for p in self.checkpoint.vae.module.parameters())}

    @cached_property
    def file_bytes(self) -> dict[str, int]:
        """Bytes of each expert's file; float32 where a released checkpoint is not here."""
        return {
            name: sum(part.weights.stored(tensor)[1] for tensor in part.weights)
            or sum(4 * p.numel() for p in part.module.parameters())
            for name, part in self.checkpoint.experts.items()
        }

    @cached_property
    def expert_sizes(self) -> dict[str, Sizes]:
        """Each expert's weights on the device, with the LoRA adapters kept beside them."""
        found = {}
        for name, part in self.checkpoint.experts.items():
            sizes = sizes_of(part.module, self._dtype_of(part.module))
            adapters = sum(
                math.prod(lora.store[tensor].shape)
                for lora in (self.loras.get(name, []) if self.lora_mode != "merge" else [])
                for delta in lora.deltas(part.weights.shapes)
                if delta.is_adapter
                for tensor in delta.tensors
            )
            found[name] = replace(sizes, resident=sizes.resident + adapters * self.dtype.itemsize)
        return found

    @cached_property
    def text_sizes(self) -> Sizes | None:
        """The text encoder's weights on the device; None if it runs elsewhere, or sharded."""
        if self.text_device != self.device or self.request.t5_fsdp:
            return None
        return sizes_of(self.checkpoint.text_encoder.module, lambda _: self.text_dtype)

    @cached_property
    def fp8_bytes(self) -> int:
        """See `working_bytes`: to look through all layers for each of a thousand sizes takes seconds."""
        return working_bytes(self.transformer, self.dtype)

    @property
    def uses_negative(self) -> bool:
        """Whether the negative prompt is encoded."""
        return self.guided or self.request.guide[0] != 1

    @property
    def transformer(self) -> WanModel:
        """An expert, on the meta device; all have the same sizes."""
        return next(iter(self.checkpoint.experts.values())).module

    def windows(self, frames: int, *, image: bool) -> list[tuple[int, int]]:
        """See `windows_of`; a first frame keeps a video in one piece."""
        return windows_of(frames, None if image or self.config.mask_channels else self.request.windows)

    def texts(self, video: Job | Video) -> list[str]:
        """The texts to encode for a video; the negative prompt only for guided steps and NAG."""
        plan = self.of(video)
        prompts = prompts_by_window(video.prompt, len(plan.windows(video.frame_num, image=video.image is not None)))
        return [*prompts, video.negative_prompt] if plan.uses_negative else prompts

    def video(self, job: Job | Video) -> VideoPlan:
        return self.of(job).videos[video_kind(job)]

    def largest(self) -> VideoPlan:
        found = (video for plan in self.variants.values() or [self] for video in plan.videos.values())
        return max(found, key=lambda video: (video.tokens, video.encoded is not None))

    def place(self, job: Job) -> str:
        """The job's number, and its place among this process's videos: "0006 (3 of 500)"."""
        place = bisect_right(self.jobs, job.index, key=lambda other: other.index)
        return f"{job.number} ({place} of {len(self.jobs)})"

    def meaning(self, job: Job) -> dict[str, Any]:
        """The value for this job of every option that affects the video: equal meanings make equal videos.
        An option that sets another one (a prompt file, `--seconds`) is recorded by that one's value."""
        if (own := self.of(job)) is not self:
            return own.meaning(job)
        assert self.sampling is not None, "a plan with jobs has a sampling"
        values = {name: getattr(self.request, name) for name, row in OPTIONS.items() if row.scope is VIDEO}
        values |= {
            "prompt": job.prompt, "negative_prompt": job.negative_prompt,
            **{name: path and digest(path, clip=name == "video") for name, path in job.pictures.items()},
            "window": self.request.window if self.video(job).windows else None,
            "size": list(job.size), "frame_num": job.frame_num, "base_seed": job.seed,
            "ckpt_dir": self._files | self.lora_stacks(),
            "lora_alpha": None, "lora_mode": self.lora_mode if self.loras else None,
            "sample_solver": self.sampling.solver,
            "sample_steps": [{**vars(step)} for step in self.steps[self.video(job).first_step :]],
            "sample_shift": None, "sample_guide_scale": None, "timesteps": None, "high_steps": None,
            "noise_device": self.noise_device.type, "device": self.device.type, "dtype": dtype_name(self.dtype),
        }  # fmt: skip
        return {name: value for name, value in values.items() if not OPTIONS[name].into}

    def lora_stacks(self) -> dict[str, list[list[Any]]]:
        """By expert, for each of its LoRAs: fingerprints of its files, strength, alpha."""
        return {
            f"{expert} LoRAs": [
                [*(self.fingerprints[str(file)] for file in lora.store.files), lora.strength, lora.assumed_alpha]
                for lora in loras
            ]
            for expert, loras in self.loras.items()
        }

    def networks(self) -> tuple[Any, ...]:
        """Equal for plans that load the same networks in the same way, LoRAs aside."""
        request = self.request
        return (
            self._files, self.device, self.text_device, self.dtype, self.text_dtype, self.lora_mode, self.layout,
            request.quantize, request.vae_dtype, request.convert_model_dtype, request.dit_fsdp, request.t5_fsdp,
        )  # fmt: skip

    @cached_property
    def _files(self) -> dict[str, Any]:
        files = self.checkpoint.weight_files()
        return {name: [self.fingerprints[str(f)] for f in found] for name, found in files.items()}


def is_absent(request: Request, device: torch.device) -> bool:
    """Whether the run's card is not in this machine: `--vram GB --dry_run` on a CPU."""
    return request.vram is not None and request.dry_run and device.type == "cpu"


def video_kind(video: Job | Video) -> VideoKind:
    return video.size, video.frame_num, video.image is not None, video.video is not None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
