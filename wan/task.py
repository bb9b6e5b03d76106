"""What the three tasks share: the networks of one checkpoint, and text -> conditioning -> latent -> video with them.

Shapes: C latent channels, f, h, w latent frames, rows, columns; F, H, W frames, rows, columns of the video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from easydict import EasyDict
from PIL import Image
from torch import Tensor

from lightning.lora import Lora, files_of
from lightning.merge import Merge
from wan.distributed.mesh import flag_conflicts
from wan.distributed.parallel import Parallel, layout_for, parallelize
from wan.distributed.runtime import Runtime
from wan.distributed.vae_parallel import SplitVAE
from wan.loading.checkpoint import Checkpoint
from wan.loading.residency import Experts
from wan.loading.stream import as_dtype, free_memory, parameter_dtypes
from wan.modules.attention import BACKENDS, Choice, choose
from wan.modules.model import Prompt, WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.tokenizers import UMT5Tokenizer
from wan.modules.vae import WanVAE
from wan.request.settings import Sampling
from wan.sampling import Conditioning, Step, denoise, make_schedule, plan_steps
from wan.utils.errors import InputError
from wan.utils.progress import Progress


@dataclass(frozen=True)
class Start:
    """What a task conditions on besides the text: the latent's shape, and what the image gives."""

    shape: tuple[int, int, int, int]
    channels: Tensor | None = None
    first_frame: Tensor | None = None


class VideoTask(ABC):
    """One task's networks. Opening reads headers only; each network is loaded when it is first needed."""

    name: ClassVar[str]

    def __init__(
        self,
        config: EasyDict,
        checkpoint_dir: str | Path,
        lora_dir: str | Path | None = None,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_sp: bool = False,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
        convert_model_dtype: bool = False,
        *,
        device: torch.device | None = None,
        loras: Mapping[str, list[Lora]] | None = None,
        lora_mode: str = "merge",
        expert_files: Mapping[str, Path] | None = None,
        attention: str = "auto",
        noise_device: str = "auto",
        progress: Progress | None = None,
        runtime: Runtime | None = None,
        ulysses_size: int = 1,
        ring_size: int = 1,
    ) -> None:
        """The original's arguments, then ours.

        config: one of WAN_CONFIGS. loras: by expert, in place of lora_dir. init_on_cpu: experts wait in host memory
        and are brought to the device when needed; sharded ones stay there. use_sp: all processes make one video, those
        of `runtime` or, without it, of torch.distributed. InputError listing everything that is wrong with the files.
        """
        self.config, self.progress = config, progress or Progress(quiet=True)
        if device is None:
            device = torch.device("cuda", device_id) if torch.cuda.is_available() else torch.device("cpu")
        self.device, self.noise_device = device, device if noise_device == "auto" else torch.device(noise_device)
        self.dtype, self.t5_dtype = as_dtype(config.param_dtype), as_dtype(config.t5_dtype)
        self.text_device = torch.device("cpu") if t5_cpu else device
        self.home = torch.device("cpu") if init_on_cpu and not dit_fsdp else device
        self.convert_model_dtype, self.lora_mode = convert_model_dtype, lora_mode
        self.checkpoint = Checkpoint(Path(checkpoint_dir), self.name, config, expert_files)
        self.checkpoint.raise_problems()
        if loras is None:
            files = files_of(Path(lora_dir), list(config.experts)) if lora_dir else {}
            loras = {name: [Lora.open(path, expert=name)] for name, path in files.items()}
        self.loras = loras
        first, _ = next(iter(self.checkpoint.experts.values()))
        self.runtime = runtime or (Runtime.joined() if use_sp or dit_fsdp or t5_fsdp else Runtime())
        self.t5_fsdp, self.dit_fsdp = t5_fsdp, dit_fsdp
        if conflicts := flag_conflicts(
            ring=ring_size, attention=attention, t5_fsdp=t5_fsdp, t5_cpu=t5_cpu, dit_fsdp=dit_fsdp, lora_mode=lora_mode
        ):
            raise InputError(conflicts)
        ulysses = self.runtime.team.size if use_sp else ulysses_size
        self.layout = layout_for(self.runtime, device, first.num_heads, ulysses, ring_size, dit_fsdp or t5_fsdp)
        self.attention = choose_attention(attention, device, self.dtype, first).name
        self._contexts: dict[str, Tensor] = {}

    @cached_property
    def parallel(self) -> Parallel:
        """This process's part. All processes must ask for it at the same time: it connects them."""
        parallel = parallelize(self.runtime, self.layout, self.device)
        self.attention = parallel.team.from_first(lambda: self.attention)  # "auto" is timed, so ranks may differ
        return parallel

    @staticmethod
    def video_size(image: Image.Image | None, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the video for this image and `--size`."""
        return size

    @abstractmethod
    def start(self, image: Image.Image | None, size: tuple[int, int], frames: int) -> Start:
        """What this task makes of an image and a size (width, height; with an image only their product counts)."""

    def latent_shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        """[C, f, h, w] of a video of `size` (width, height) and 4n + 1 frames."""
        time, rows, columns = self.vae.stride
        return self.vae.z_dim, (frames - 1) // time + 1, size[1] // rows, size[0] // columns

    # -- text

    def encode(self, texts: Iterable[str]) -> None:
        """Run the text encoder on every text that has not been encoded before, and keep the result."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._contexts]
        if not fresh:
            return
        encoder, tokenizer = self.text_encoder
        with self.progress.stage("text", total=len(fresh), unit="prompt"), torch.no_grad():
            for text in fresh:
                self._contexts[text] = encoder(torch.tensor(tokenizer(text), device=self.text_device)).to(self.device)
                self.progress.advance(1)

    @cached_property
    def text_encoder(self) -> tuple[UMT5Encoder, UMT5Tokenizer]:
        assert self.checkpoint.text_encoder is not None
        module, store = self.checkpoint.text_encoder
        tokenizer = UMT5Tokenizer(self.checkpoint.folder / self.config.t5_tokenizer, self.config.text_len)
        with self._loading("text encoder", store.path.stat().st_size, self.t5_fsdp) as report:
            encoder = self.parallel.load(
                module, store, sharded=self.t5_fsdp, home=self.text_device, dtype=lambda _: self.t5_dtype, report=report
            )
        return encoder, tokenizer

    def release_text_encoder(self) -> None:
        self.__dict__.pop("text_encoder", None)
        free_memory()

    # -- denoising

    @cached_property
    def experts(self) -> Experts:
        models = {}
        merged = self.lora_mode == "merge"
        if not merged:
            from lightning.adapter import add_adapters, set_scale  # takes seconds to import
        dtype = parameter_dtypes(self.dtype, self.convert_model_dtype)
        for name, (module, store) in self.checkpoint.experts.items():
            loras = self.loras.get(name, [])
            merge = Merge(loras, store.shapes, self.device, linear_pairs=merged) if loras else None
            with self._loading(f"{name} expert", sum(e.bytes for e in store.values()), self.dit_fsdp) as report:
                models[name] = self.parallel.load(
                    module, store, sharded=self.dit_fsdp, home=self.home, dtype=dtype, merge=merge, report=report
                )
            models[name].use_attention(BACKENDS[self.attention])
            self.parallel.split_tokens(models[name])
            if not merged:
                add_adapters(models[name], loras)
        return Experts(models, self.device, None if merged else set_scale)

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
        """The final latent, float32 [C, f, h, w] on the device."""
        schedule = make_schedule(sampling)
        steps = plan_steps(schedule.timesteps, sampling, self.config.boundary)
        texts = [prompt, negative_prompt] if any(step.guided for step in steps) else [prompt]
        self.encode(texts)
        text, *negative = (Prompt(self._contexts[text]) for text in texts)
        start = self.start(image, size, frames)
        generator = torch.Generator(self.noise_device).manual_seed(seed)
        noise = torch.randn(start.shape, generator=generator, device=self.noise_device).to(self.device)
        noise = self.parallel.same(noise)
        conditioning = Conditioning(text, negative[0] if negative else None, start.channels, start.first_frame)
        experts = self.experts
        with self.progress.stage("denoise", total=len(steps), unit="step"):
            latent = denoise(experts, noise, conditioning, schedule, steps, on_step)
        if experts.offload:
            experts.leave()  # decoding needs the room
        return latent

    # -- pixels

    @cached_property
    def vae(self) -> WanVAE | SplitVAE:
        assert self.checkpoint.vae is not None
        module, store = self.checkpoint.vae
        with self._loading("VAE", store.path.stat().st_size) as report:
            vae = self.parallel.load(
                module, store, sharded=False, home=self.device, dtype=lambda _: torch.float32, report=report
            )
        vae.use_channels_last()
        return self.parallel.split_frames(vae)

    def decode(self, latent: Tensor, tiled: bool = False) -> Generator[Tensor]:
        """Chunks [3, t, H, W] float32 in [-1, 1], in order. `tiled`: a quarter of the frame at a time, same numbers.

        Of processes that make a video together the first gets them; the others must run the iterator and get none.
        """
        with torch.no_grad():
            yield from self.vae.decode(latent.to(self.device), tiles=(2, 2) if tiled else (1, 1))

    @contextmanager
    def _loading(self, what: str, size: int, sharded: bool = False) -> Iterator[Callable[[int], None]]:
        with self.progress.stage("load", total=size / self.layout.sequence if sharded else size, unit="B"):
            yield lambda count: self.progress.advance(count, what)

    # -- the original's `generate`

    def _generate(
        self,
        prompt: str,
        image: Image.Image | None,
        size: tuple[int, int],
        frame_num: int,
        shift: float,
        sample_solver: str,
        sampling_steps: int,
        guide_scale: float | tuple[float, float],
        n_prompt: str,
        seed: int,
        offload_model: bool,
    ) -> Tensor | None:
        """What the three public `generate` methods do: the whole video, float32 [3, F, H, W] in [-1, 1].

        None on all but the first of the processes that make it together.
        """
        low, high = guide_scale if isinstance(guide_scale, tuple | list) else (guide_scale, guide_scale)
        sampling = Sampling(sample_solver, sampling_steps, shift, (float(low), float(high)))
        if seed < 0:
            seed = self.parallel.team.from_first(lambda: torch.seed() % (1 << 31))
        self.experts.offload = offload_model
        latent = self.sample(prompt, n_prompt or self.config.sample_neg_prompt, image, size, frame_num, seed, sampling)
        if offload_model:
            self.release_text_encoder()
        chunks = list(self.decode(latent))
        return torch.cat(chunks, dim=1) if chunks else None


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, model: WanModel) -> Choice:
    """The attention back end to use; "auto" is the fastest here. InputError if `name` cannot run here."""
    try:
        return choose(name, device, dtype, model.num_heads, model.head_width)
    except ValueError as e:
        raise InputError(str(e)) from e
