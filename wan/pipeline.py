"""The networks of a plan, loaded, and one video through them: text -> conditioning -> latent -> frames.

Nothing is decided here: the plan says what was opened and chosen. Each network is loaded by the method named so.
Shapes: C latent channels, f, h, w latent frames, rows, columns; F, H, W frames, rows, columns of the video.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from lightning.merge import Merge
from wan.distributed.launch import Runtime
from wan.distributed.mesh import make_mesh
from wan.distributed.ulysses import split_tokens
from wan.distributed.vae_parallel import SplitVAE
from wan.jobs.job import Job
from wan.media.images import open_image
from wan.media.previews import Strip
from wan.media.video import read_clip
from wan.modules.attention import BACKENDS
from wan.modules.context import Prompt
from wan.modules.fused import choose_fused as choose_passes
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE
from wan.offload.networks import Experts, Networks, text_encoder
from wan.offload.reader import Source, Store, load, parameter_dtypes
from wan.planning.memory import decode_tiles, memory_now, plan_video
from wan.planning.plan import Plan, dtype_name, video_kind
from wan.sampling import Conditioning, OnStep, Step, Video, denoise, make_schedule, predict_clean
from wan.utils.accelerator import Accelerator, free_memory
from wan.utils.errors import out_of_memory
from wan.utils.files import Beside
from wan.utils.progress import Progress

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")
Encode = Callable[[Sequence[Tensor]], list[Tensor]]  # ids of texts -> rows of each
FINER = "decode: once more, in tiles or smaller ones (--vae_tiling starts with tiles)"
FEWER = 0.8  # of the free memory that a second try uses
TEXTS = 64  # prompts that the text encoder reads together: 0.5 GB of activations at most
TEXT_SLOTS = 3  # blocks of the text encoder at a time: it runs once over all texts


class Start(NamedTuple):
    """An image or a clip as a task's conditioning (see `Conditioning`); all None without one."""

    channels: Tensor | None = None
    first_frame: Tensor | None = None
    video: Tensor | None = None


class Pipeline(ABC):
    """One task's networks, as planned."""

    def __init__(self, plan: Plan, progress: Progress, runtime: Runtime) -> None:
        """Connect the processes of `runtime` as planned: all of them must make their pipelines at the same time."""
        self.plan, self.progress = plan, progress
        self.mesh = make_mesh(plan.layout, plan.device.type, runtime.team.rank)
        self.attention = self.mesh.team.broadcast(lambda: plan.attention)  # "auto" is timed: ranks may differ
        self.experts: Experts | None = None
        self.vae: WanVAE | SplitVAE | None = None
        self.offload = plan.offload  # the experts give their memory back for decoding
        self._again = False  # whether another video follows
        self._text_encoder: Encode | None = None
        self._contexts: dict[str, Tensor] = {}

    @classmethod
    def of_plan(cls, plan: Plan, progress: Progress, runtime: Runtime) -> Self:
        """A pipeline of this class for a plan made elsewhere, past the original's constructor."""
        pipe = cls.__new__(cls)
        Pipeline.__init__(pipe, plan, progress, runtime)
        return pipe

    @abstractmethod
    def start(self, video: Video) -> Start:
        """The task's conditioning for `video`, whose size and length are in the plan."""

    # -- text

    def texts(self, video: Video | Job) -> list[str]:
        """The texts to encode for a video; the negative prompt only where a step is guided."""
        return [video.prompt, video.negative_prompt] if self.plan.guided else [video.prompt]

    def load_text_encoder(self) -> Encode:
        """InputError for a corrupt file."""
        if self._text_encoder is None:
            plan, part = self.plan, self.plan.checkpoint.text_encoder
            if plan.request.t5_fsdp:
                with self._loading("text encoder", [part.weights], sharded=True) as report:
                    self._text_encoder = self.load(
                        part.module, part.weights, sharded=True, home=plan.text_device,
                        dtype=lambda _: plan.text_dtype, report=report,
                    )  # fmt: skip
            else:
                source, slots = Source(part.weights, lambda _: plan.text_dtype), TEXT_SLOTS if plan.offload else None
                self._text_encoder = text_encoder(part.module, source, plan.text_device, slots)
        return self._text_encoder

    def encode(self, texts: Iterable[str]) -> None:
        """Run the text encoder on every text that it has not encoded yet, and keep the results in host memory."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._contexts]
        if not fresh:
            return
        plan, encode = self.plan, self.load_text_encoder()
        with self.progress.stage("text", total=len(fresh), unit="prompt"), torch.no_grad():
            for start in range(0, len(fresh), TEXTS):  # the device's memory must not grow with a batch
                texts = fresh[start : start + TEXTS]
                ids = [torch.tensor(plan.checkpoint.tokenizer(text), device=plan.text_device) for text in texts]
                self._contexts |= {text: rows.cpu() for text, rows in zip(texts, encode(ids), strict=True)}
                self.progress.advance(len(texts))

    def release_text_encoder(self) -> None:
        self._text_encoder = None
        free_memory()

    # -- denoising

    def load_experts(self) -> Experts:
        """InputError for a corrupt file."""
        if self.experts is not None:
            return self.experts
        plan, merged = self.plan, self.plan.lora_mode == "merge"
        sources: dict[str, tuple[WanModel, Source]] = {}
        for name, part in plan.checkpoint.experts.items():
            loras = plan.loras.get(name)
            merge = Merge(loras, part.weights.shapes, plan.device, linear_pairs=merged) if loras else None
            dtype = parameter_dtypes(plan.dtype, plan.request.convert_model_dtype, part.module)
            sources[name] = part.module, Source(part.weights, dtype, merge)
        networks, stores = None, [source.store for _, source in sources.values()]
        with self._loading("experts", stores, sharded=plan.request.dit_fsdp) as report:
            if plan.request.dit_fsdp:
                models = {
                    name: self.load(
                        module, source.store, sharded=True, home=plan.device, dtype=source.dtype, merge=source.merge,
                        report=report,
                    )
                    for name, (module, source) in sources.items()
                }  # fmt: skip
            else:
                networks = Networks(sources, plan.device, report)
                models = networks.models
                if not plan.offload or plan.room is None:
                    networks.preload(report)
        set_scale: Callable[[WanModel, float], None] | None = None
        for name, model in models.items():
            model.use_attention(BACKENDS[self.attention])
            split_tokens(model, self.mesh)
            if not merged:
                from lightning import peft_adapter  # takes seconds to import

                set_scale = peft_adapter.set_scale
                peft_adapter.add_adapters(model, plan.loras.get(name, []), plan.device)
        self.experts = Experts(models, networks, set_scale)
        return self.experts

    def sample_or_retry(self, video: Video, on_step: OnStep = lambda *_: None, *, again: bool = False) -> Tensor:
        """`sample` by all of the team, in the memory that is free now: other programs come and go between videos.

        After out of memory once more with fewer slots; the numbers do not depend on them.
        """
        team, kind = self.mesh.team, video_kind(video)

        def attempt(fewer: bool) -> Tensor:
            if self.plan.room is not None:
                room = min(team.gather(memory_now(self.plan)))  # ranks stream alike
                plan = replace(self.plan, room=int(room * FEWER) if fewer else room)
                self.plan = replace(plan, videos={**plan.videos, kind: plan_video(plan, *kind)})
            if fewer and self.experts:
                self.experts.leave()
            return team.all_or_none(lambda: self.sample(video, on_step, again=again))

        if self.plan.room is None or not self.plan.offload:
            return attempt(False)
        return retry_smaller(self.progress, "denoise: once more, with fewer blocks on the device", attempt)

    def sample(self, video: Video, on_step: OnStep = lambda *_: None, *, again: bool = False) -> Tensor:
        """The final latent, float32 [C, f, h, w] on the device. JobError if it stops being finite.

        again: another video follows, whose first weights are read while this one is decoded.
        """
        plan, self._again = self.plan, again
        assert plan.sampling is not None, "a plan with videos has a sampling"
        generator = torch.Generator(plan.noise_device).manual_seed(video.seed)

        def draw(shape: Sequence[int]) -> Tensor:
            """The generator's next numbers, the same on all processes that make this video."""
            return self.mesh.same(torch.randn(shape, generator=generator, device=plan.noise_device).to(plan.device))

        facts, texts = plan.video(video), self.texts(video)
        schedule = make_schedule(plan.sampling, draw, len(plan.steps) - len(facts.steps))
        self.encode(texts)
        text, *negative = (Prompt(self._contexts[text].to(plan.device)) for text in texts)
        conditioning = Conditioning(text, negative[0] if negative else None, *self.start(video))
        experts, noise, budget = self.load_experts(), draw(facts.latent), facts.budget
        passes = [(step.expert, 1 + step.guided) for step in facts.steps]
        self._choose_passes(experts, facts.tokens, sum(count for _, count in passes))
        slots = budget.slots if budget and not budget.resident else None
        # weights that pass through, or are gathered from the other processes, come once for both passes of a step
        batch_guidance = budget.batch_guidance if budget else plan.request.dit_fsdp
        if budget and budget.vae_leaves:
            self.vae = None
            free_memory()
        job = experts.job(passes, slots, batch_guidance, again=again or not self.offload)
        with self.progress.stage("denoise", total=len(facts.steps), unit="step"), job:
            latent = denoise(experts, noise, conditioning, schedule, facts.steps, on_step)
        if self.offload:
            # decoding needs the memory; where none was counted, all of it
            experts.leave(budget.between if budget and again and plan.room is not None else 0)
        return latent

    def _choose_passes(self, experts: Experts, tokens: int, forwards: int) -> None:
        """Compile the passes between the matrix products, if a run of `forwards` is long enough to gain from it."""
        model = self.plan.transformer
        width = model.num_heads * model.head_width
        passes, note = choose_passes(self.plan.device, tokens, width, len(model.blocks), forwards)
        for each in experts.models.values():
            each.use_passes(passes)
        if note:
            self.progress.say(note)

    def sample_job(self, job: Job, *, again: bool = False) -> Tensor:
        """The planned job's final latent. JobError if it stops being finite. again: see `sample`."""

        def read(name: str, path: Path) -> Any:
            fps = self.plan.config.sample_fps
            return read_clip(path, job.frame_num, fps, job.size) if name == "video" else open_image(path)

        given = self.mesh.team.all_or_none(lambda: {n: read(n, path) for n, path in job.pictures.items() if path})
        video = Video(job.prompt, job.negative_prompt, job.size, job.frame_num, job.seed, **given)
        strip = Strip(Beside.of(job.save_file).strip)

        def show(step: Step, sample: Tensor, velocity: Tensor) -> None:
            if self.plan.request.preview_steps:
                frame = self.look(predict_clean(step, sample, velocity))
                if frame is not None:
                    strip.add(frame)
            self.progress.advance(1, str(step))

        return self.sample_or_retry(video, show, again=again)

    # -- pixels

    def load_vae(self) -> WanVAE | SplitVAE:
        """InputError for a corrupt file."""
        if self.vae is None:
            module, weights = self.plan.checkpoint.vae.module, self.plan.checkpoint.vae.weights
            with self._loading("VAE", [weights]) as report:
                vae = self.load(
                    module, weights, sharded=False, home=self.plan.device,
                    dtype=lambda name: module.get_parameter(name).dtype, report=report,
                )  # fmt: skip
            vae.use_channels_last()
            self.vae = vae if self.mesh.sequence is None else SplitVAE(vae, self.mesh)
        return self.vae

    def encode_video(self, video: Video) -> Tensor | None:
        """The latent of the clip that `video` is made from; None without one."""
        if video.video is None:
            return None
        with self.progress.stage("image"), torch.no_grad():
            return self.load_vae().encode(video.video, tiles=self.plan.video(video).encode_tiles)

    def load_networks(self) -> None:
        """Load all that a video needs once its text is encoded."""
        self.load_experts()
        self.load_vae()

    def decode(self, latent: Tensor, *, finer: bool = False) -> Generator[Tensor]:
        """Chunks [3, t, H, W] float32 in [-1, 1], in order; finer: in smaller tiles, same numbers.

        Of processes that make a video together the first gets them; the others must run the iterator and get none.
        """
        tiles = decode_tiles(self.plan, latent.shape, finer=finer)
        if finer and self.experts and self.offload:
            self.experts.leave()
        beside = self.experts.ahead() if self.experts and self._again else nullcontext()
        with torch.no_grad(), beside:  # the next video's first weights are read meanwhile
            yield from self.load_vae().decode(latent.to(self.plan.device), tiles=tiles)

    def look(self, latent: Tensor) -> Tensor | None:
        """The frame [3, H, W] in the middle of a latent, on the first of the processes; all must call this."""
        middle, tiles = latent.shape[1] // 2, decode_tiles(self.plan, latent.shape)
        with torch.no_grad():
            chunks = list(self.load_vae().decode(latent[:, middle : middle + 1], tiles=tiles))
        return chunks[0][:, 0] if chunks else None

    def info(self) -> dict[str, str]:
        """Machine and numerics, for the record."""
        device = self.plan.device
        return {
            "device": f"{device} ({Accelerator(device).name})",
            "dtype": dtype_name(self.plan.dtype),
            "attention": self.attention,
            "processes": str(self.plan.layout),
            "diffusers": version("diffusers"),
        }

    def load(self, module: Module, store: Store, *, sharded: bool, **how: Any) -> Module:
        """`module` with its weights, or with this process's shards of them. how: see `wan.offload.reader.load`."""
        if not sharded or self.mesh.shards is None:
            return load(module, store, **how)
        from wan.distributed.fsdp import load_sharded  # takes seconds to import

        return load_sharded(module, store, mesh=self.mesh, **how)

    @contextmanager
    def _loading(self, name: str, stores: Iterable[Store], *, sharded: bool = False) -> Iterator[Callable[[int], None]]:
        size = sum(entry.bytes for store in stores for entry in store.values())
        with self.progress.stage("load", total=size / self.plan.layout.sequence if sharded else size, unit="B"):
            yield lambda count: self.progress.advance(count, name)


def retry_smaller(progress: Progress, note: str, attempt: Callable[[bool], Result]) -> Result:
    """`attempt(False)`; after out of memory `note` is printed, and `attempt(True)` needs less."""
    try:
        return attempt(False)
    except Exception as error:
        if not out_of_memory(error):
            raise
    # Out here the exception no longer holds the failed attempt's tensors.
    progress.say(f"out of memory in {note}")
    free_memory()
    return attempt(True)
