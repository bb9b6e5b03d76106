"""The networks of a plan, loaded, and one video through them: text -> conditioning -> latent -> frames.

Nothing is decided here: what was opened and chosen stands in the plan. Each network is loaded by the method named so.
Shapes: C latent channels, f, h, w latent frames, rows, columns; F, H, W frames, rows, columns of the video.
"""

from __future__ import annotations

import copy
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from lightning.merge import Merge
from wan.distributed.mesh import make_mesh
from wan.distributed.runtime import Runtime
from wan.distributed.sequence import split_tokens
from wan.distributed.vae_parallel import SplitVAE
from wan.loading.residency import Experts
from wan.loading.stream import Store, free_memory, load, parameter_dtypes
from wan.modules.attention import BACKENDS
from wan.modules.model import Prompt
from wan.modules.t5 import UMT5Encoder
from wan.modules.tokenizers import UMT5Tokenizer
from wan.modules.vae import WanVAE
from wan.plan import Plan
from wan.request.settings import Job, Sampling
from wan.sampling import Conditioning, Step, denoise, make_schedule, plan_steps
from wan.utils.images import open_image
from wan.utils.progress import Progress

Module = TypeVar("Module", bound=nn.Module)
Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Start:
    """What a task conditions on besides the text: the latent's shape, and what the image gives."""

    shape: tuple[int, int, int, int]
    channels: Tensor | None = None
    first_frame: Tensor | None = None


class Pipeline(ABC):
    """One task's networks, as planned."""

    def __init__(self, plan: Plan, progress: Progress, runtime: Runtime) -> None:
        """Connects the processes of `runtime` as planned: all of them must make their pipelines at the same time."""
        self.plan, self.progress = plan, progress
        self.mesh = make_mesh(plan.layout, plan.device.type, runtime.team.rank)
        self.attention = self.mesh.team.from_first(lambda: plan.attention)  # "auto" is timed: ranks may differ
        self.experts: Experts | None = None
        self.vae: WanVAE | SplitVAE | None = None
        self._text_encoder: tuple[UMT5Encoder, UMT5Tokenizer] | None = None
        self._contexts: dict[str, Tensor] = {}

    @abstractmethod
    def start(self, image: Image.Image | None, size: tuple[int, int], frames: int) -> Start:
        """What this task makes of an image, for a video of `size` (width, height)."""

    def latent_shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        """[C, f, h, w] of a video of `size` (width, height) and 4n + 1 frames."""
        vae = self.load_vae()
        time, rows, columns = vae.stride
        return vae.z_dim, (frames - 1) // time + 1, size[1] // rows, size[0] // columns

    # -- text

    def texts(self, job: Job) -> list[str]:
        """What the text encoder must read for this job; the negative prompt only where a step is guided."""
        guided = any(step.guided for step in self.plan.steps)
        return [job.prompt, job.negative_prompt] if guided else [job.prompt]

    def load_text_encoder(self) -> tuple[UMT5Encoder, UMT5Tokenizer]:
        """InputError for a file that turns out to be corrupt."""
        if self._text_encoder is None:
            plan, config = self.plan, self.plan.config
            module, store = _fresh(plan.checkpoint.text_encoder)
            tokenizer = UMT5Tokenizer(plan.checkpoint.folder / config.t5_tokenizer, config.text_len)
            with self._loading("text encoder", store.path.stat().st_size, plan.request.t5_fsdp) as report:
                encoder = self.load(
                    module, store, sharded=plan.request.t5_fsdp, home=plan.text_device,
                    dtype=lambda _: plan.text_dtype, report=report,
                )  # fmt: skip
            self._text_encoder = encoder, tokenizer
        return self._text_encoder

    def encode(self, texts: Iterable[str]) -> None:
        """Run the text encoder on every text that has not been encoded before, and keep the result."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._contexts]
        if not fresh:
            return
        encoder, tokenizer = self.load_text_encoder()
        with self.progress.stage("text", total=len(fresh), unit="prompt"), torch.no_grad():
            for text in fresh:
                tokens = torch.tensor(tokenizer(text), device=self.plan.text_device)
                self._contexts[text] = encoder(tokens).to(self.plan.device)
                self.progress.advance(1)

    def release_text_encoder(self) -> None:
        self._text_encoder = None
        free_memory()

    # -- denoising

    def load_experts(self) -> Experts:
        """InputError for a file that turns out to be corrupt."""
        if self.experts is not None:
            return self.experts
        plan, models = self.plan, {}
        merged = plan.lora_mode == "merge"
        if not merged:
            from lightning.adapter import add_adapters, set_scale  # takes seconds to import
        dtype = parameter_dtypes(plan.dtype, plan.request.convert_model_dtype)
        sharded = plan.request.dit_fsdp
        home = torch.device("cpu") if plan.offload and not sharded else plan.device
        for name in plan.checkpoint.experts:
            module, store = _fresh(plan.checkpoint.experts[name])
            loras = plan.loras.get(name, [])
            merge = Merge(loras, store.shapes, plan.device, linear_pairs=merged) if loras else None
            with self._loading(f"{name} expert", sum(e.bytes for e in store.values()), sharded) as report:
                models[name] = self.load(
                    module, store, sharded=sharded, home=home, dtype=dtype, merge=merge, report=report
                )
            models[name].use_attention(BACKENDS[self.attention])
            split_tokens(models[name], self.mesh)
            if not merged:
                add_adapters(models[name], loras)
        self.experts = Experts(models, plan.device, None if merged else set_scale)
        return self.experts

    def sample(
        self,
        prompt: str,
        negative_prompt: str,
        image: Image.Image | None,
        size: tuple[int, int],
        frames: int,
        seed: int,
        sampling: Sampling,
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> Tensor:
        """The final latent, float32 [C, f, h, w] on the device. JobError if it stops being finite."""
        schedule = make_schedule(sampling)
        steps = plan_steps(schedule.timesteps, sampling, self.plan.config.boundary)
        texts = [prompt, negative_prompt] if any(step.guided for step in steps) else [prompt]
        self.encode(texts)
        text, *negative = (Prompt(self._contexts[text]) for text in texts)
        start = self.start(image, size, frames)
        device, noise_device = self.plan.device, self.plan.noise_device
        generator = torch.Generator(noise_device).manual_seed(seed)
        noise = torch.randn(start.shape, generator=generator, device=noise_device).to(device)
        noise = self.mesh.same(noise)
        conditioning = Conditioning(text, negative[0] if negative else None, start.channels, start.first_frame)
        experts = self.load_experts()
        with self.progress.stage("denoise", total=len(steps), unit="step"):
            latent = denoise(experts, noise, conditioning, schedule, steps, on_step)
        if experts.offload:
            experts.leave()  # decoding needs the room
        return latent

    def sample_job(self, job: Job) -> Tensor:
        """The planned job's final latent. JobError if it stops being finite."""
        sampling = self.plan.sampling
        assert sampling is not None, "a plan with jobs has a sampling"
        image = self.mesh.team.agree(lambda: open_image(job.image) if job.image else None)

        def show(step: Step) -> None:
            self.progress.advance(1, str(step))

        return self.mesh.team.agree(
            lambda: self.sample(
                job.prompt, job.negative_prompt, image, job.size, job.frame_num, job.seed, sampling, show
            )
        )

    # -- pixels

    def load_vae(self) -> WanVAE | SplitVAE:
        """InputError for a file that turns out to be corrupt."""
        if self.vae is None:
            module, store = _fresh(self.plan.checkpoint.vae)
            with self._loading("VAE", store.path.stat().st_size) as report:
                vae = self.load(
                    module, store, sharded=False, home=self.plan.device, dtype=lambda _: torch.float32, report=report
                )
            vae.use_channels_last()
            self.vae = vae if self.mesh.sequence is None else SplitVAE(vae, self.mesh)
        return self.vae

    def load_networks(self) -> None:
        """All that a video needs once its text is encoded."""
        self.load_experts()
        self.load_vae()

    def decode(self, latent: Tensor, tiled: bool = False) -> Generator[Tensor]:
        """Chunks [3, t, H, W] float32 in [-1, 1], in order. `tiled`: a quarter of the frame at a time, same numbers.

        Of processes that make a video together the first gets them; the others must run the iterator and get none.
        """
        tiled = tiled or self.plan.request.vae_tiling
        with torch.no_grad():
            yield from self.load_vae().decode(latent.to(self.plan.device), tiles=(2, 2) if tiled else (1, 1))

    def info(self) -> dict[str, str]:
        """What the record says about the machine and the numerics."""
        device = self.plan.device
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        return {
            "device": f"{device} ({name})",
            "dtype": str(self.plan.dtype).removeprefix("torch."),
            "attention": self.attention,
            "processes": str(self.plan.layout),
            "diffusers": version("diffusers"),
        }

    def load(self, module: Module, store: Store, *, sharded: bool, **how: Any) -> Module:
        """`module` with its weights, or with this process's shards of them. how: see `wan.loading.stream.load`."""
        if not sharded or self.mesh.shards is None:
            return load(module, store, **how)
        from wan.distributed.fsdp import load_sharded  # takes seconds to import

        return load_sharded(module, store, mesh=self.mesh, **how)

    @contextmanager
    def _loading(self, what: str, size: int, sharded: bool = False) -> Iterator[Callable[[int], None]]:
        with self.progress.stage("load", total=size / self.plan.layout.sequence if sharded else size, unit="B"):
            yield lambda count: self.progress.advance(count, what)


def _fresh(part: tuple[Module, Opened] | None) -> tuple[Module, Opened]:
    """A part of the checkpoint to be loaded: its own module, so that nothing outlives the pipeline's use of it."""
    assert part is not None, "a checkpoint with problems makes no plan"
    return copy.deepcopy(part[0]), part[1]
