"""From settings to a loaded task, and one job through it: the part of a run that needs torch and weights."""

from __future__ import annotations

import copy
import platform
from collections.abc import Generator, Iterable
from importlib.metadata import version

import torch
from torch import Tensor

from lightning.lora import Lora
from wan.configs import WAN_CONFIGS
from wan.distributed.mesh import Mesh
from wan.distributed.runtime import Runtime
from wan.image2video import WanI2V
from wan.loading.checkpoint import fetch
from wan.request.settings import Job, Settings
from wan.sampling import Step, make_schedule, plan_steps
from wan.task import VideoTask
from wan.text2video import WanT2V
from wan.textimage2video import WanTI2V
from wan.utils.errors import InputError
from wan.utils.images import open_image
from wan.utils.progress import Progress

TASKS: dict[str, type[VideoTask]] = {task.name: task for task in (WanT2V, WanI2V, WanTI2V)}


class Pipeline:
    """The task of `settings`, opened; its networks are loaded by `encode` (text) and `load_networks` (video)."""

    def __init__(self, settings: Settings, progress: Progress, runtime: Runtime | None = None) -> None:
        """InputError for a checkpoint, LoRA, device, layout or back end that cannot serve."""
        self.settings, self.progress = settings, progress
        config = copy.deepcopy(WAN_CONFIGS[settings.task])
        device = compute_device(settings.device)
        if settings.dtype == "fp32" or (settings.dtype == "auto" and device.type == "cpu"):
            config.param_dtype = config.t5_dtype = "float32"
        self.fps: int = config.sample_fps
        self.task = TASKS[settings.task](
            config,
            fetch(settings.ckpt_dir, config),
            t5_fsdp=settings.t5_fsdp,
            dit_fsdp=settings.dit_fsdp,
            t5_cpu=settings.t5_cpu,
            init_on_cpu=settings.offload_model,
            convert_model_dtype=settings.convert_model_dtype,
            device=device,
            loras=open_loras(settings),
            lora_mode=settings.lora_mode,
            expert_files=settings.expert_files,
            attention=settings.attention,
            noise_device=settings.noise_device,
            progress=progress,
            runtime=runtime,
            ulysses_size=settings.ulysses_size,
            ring_size=settings.ring_size,
        )
        self.steps = plan_steps(make_schedule(settings).timesteps, settings, config.boundary)

    @property
    def mesh(self) -> Mesh:
        """Which jobs are this process's, and with whom it makes them."""
        return self.task.mesh

    def texts(self, job: Job) -> list[str]:
        """What the text encoder must read for this job; the negative prompt only where a step is guided."""
        guided = any(step.guided for step in self.steps)
        return [job.prompt, job.negative_prompt] if guided else [job.prompt]

    def load_text_encoder(self) -> None:
        """InputError for a file that turns out to be corrupt."""
        _ = self.task.text_encoder

    def encode(self, texts: Iterable[str]) -> None:
        self.task.encode(texts)

    def release_text_encoder(self) -> None:
        self.task.release_text_encoder()

    def load_networks(self) -> None:
        """Bring the experts and the VAE into memory. InputError for a file that turns out to be corrupt."""
        _ = self.task.experts, self.task.vae

    def sample(self, job: Job) -> Tensor:
        """The job's final latent, float32 [C, f, h, w]. JobError if it stops being finite."""
        image = self.mesh.team.agree(lambda: open_image(job.image) if job.image else None)

        def show(step: Step) -> None:
            self.progress.advance(1, str(step))

        return self.mesh.team.agree(
            lambda: self.task.sample(
                job.prompt, job.negative_prompt, image, job.size, job.frame_num, job.seed, self.settings, show
            )
        )

    def decode(self, latent: Tensor, tiled: bool = False) -> Generator[Tensor]:
        """Chunks [3, t, H, W] float32 in [-1, 1], in order; none on the other processes that must run it, too."""
        return self.task.decode(latent, tiled or self.settings.vae_tiling)

    def info(self) -> dict[str, str]:
        """What the record says about the machine and the numerics."""
        device = self.task.device
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        return {
            "device": f"{device} ({name})",
            "dtype": str(self.task.dtype).removeprefix("torch."),
            "attention": self.task.attention,
            "diffusers": version("diffusers"),
        }


def open_loras(settings: Settings) -> dict[str, list[Lora]]:
    """The LoRA files of each expert, opened (headers only)."""
    loras: dict[str, list[Lora]] = {}
    for choice in settings.loras:
        lora = Lora.open(choice.path, choice.strength, settings.lora_alpha, choice.expert)
        loras.setdefault(choice.expert, []).append(lora)
    return loras


def compute_device(name: str) -> torch.device:
    """The device of `--device`; "auto" is CUDA where there is one, else the CPU. InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(name)
    if not present.get(device.type):
        usable = ", ".join(kind for kind, there in present.items() if there)
        raise InputError(f"--device {name}: there is no such device here; usable: auto, {usable}")
    return device
