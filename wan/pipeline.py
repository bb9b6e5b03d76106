"""The networks of a plan, loaded, and one video through them: text -> conditioning -> latent -> frames.

Shapes: C latent channels, f, h, w latent frames, rows, columns; F, H, W frames, rows, columns of the video.
"""

from __future__ import annotations

import copy
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
from wan.media.images import Strip, open_image
from wan.media.video import read_clip
from wan.modules.attention import BACKENDS
from wan.modules.fused import choose_passes
from wan.modules.model import Prompt, WanModel
from wan.modules.vae import AS_IS, Convert, WanVAE
from wan.offload.networks import Experts, Networks, text_encoder
from wan.offload.reader import Source, load, parameter_dtypes
from wan.planning.memory import TEXTS, decode_tiles, memory_now, plan_video
from wan.planning.plan import Plan, dtype_name, video_kind
from wan.sampling import Conditioning, OnStep, Schedule, Step, Video, Windows, denoise, make_schedule, predict_clean
from wan.step_cache import StepCache
from wan.utils.accelerator import Accelerator, free_memory
from wan.utils.errors import InputError, out_of_memory
from wan.utils.files import Beside
from wan.utils.progress import Progress

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")
Report = Callable[[int], None]  # gets the bytes read
Encode = Callable[[Sequence[Tensor]], list[Tensor]]  # ids of texts -> rows of each
FINER = "decode: once more, in tiles or smaller ones (--vae_tiling starts with tiles)"
FEWER = 0.8  # of the free memory that a second try uses
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
        self._made: list[bool] = []  # with the step cache: of each step of the last video, whether it was computed
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

    def load_text_encoder(self) -> Encode:
        """InputError for a corrupt file."""
        if self._text_encoder is None:
            plan, part, home = self.plan, self.plan.checkpoint.text_encoder, self.plan.text_device
            source = Source(part.weights, lambda _: plan.text_dtype)
            if plan.request.t5_fsdp:
                with self._loading("text encoder", [source], sharded=True) as report:
                    self._text_encoder = self.load(part.module, source, home, report, sharded=True)
            else:
                self._text_encoder = text_encoder(part.module, source, home, TEXT_SLOTS if plan.offload else None)
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
        plan, merges, sharded = self.plan, self._merges(), self.plan.request.dit_fsdp
        sources: dict[str, tuple[WanModel, Source]] = {}
        for name, part in plan.checkpoint.experts.items():
            dtype = parameter_dtypes(plan.dtype, plan.request.convert_model_dtype, part.module)
            sources[name] = part.module, Source(part.weights, dtype, merges.get(name))
        networks = None
        with self._loading("experts", [source for _, source in sources.values()], sharded=sharded) as report:
            if sharded:
                models = {name: self.load(*each, plan.device, report, sharded=True) for name, each in sources.items()}
            else:
                networks = Networks(sources, plan.device, report)
                models = networks.models
                if not plan.offload or plan.room is None:
                    networks.prefetcher.preload(report)
        set_lora: Callable[[str, float], None] | None = None
        for model in models.values():
            model.use_attention(BACKENDS[self.attention])
            split_tokens(model, self.mesh)
        if plan.lora_mode == "adapter":
            from lightning.peft_adapter import add_adapters, set_scale  # takes seconds to import

            for name, model in models.items():
                add_adapters(model, plan.loras.get(name, []), plan.device)

            def set_lora(name: str, scale: float) -> None:
                set_scale(models[name], scale, self.plan.loras.get(name, []))

        self.experts = Experts(models, networks, set_lora)
        return self.experts

    def _merges(self) -> dict[str, Merge]:
        """Each expert's changes by LoRAs to merge into its weights; pairs kept as adapters are left out."""
        plan, experts, merged = self.plan, self.plan.checkpoint.experts, self.plan.lora_mode == "merge"
        shapes = {name: part.weights.shapes for name, part in experts.items()}
        return {n: Merge(loras, shapes[n], plan.device, linear_pairs=merged) for n, loras in plan.loras.items()}

    def follow(self, plan: Plan) -> None:
        """Switch to another plan. Networks that both plans share stay loaded; only changed LoRAs are read again."""
        before, self.offload = self.plan, plan.offload
        self.attention = self.mesh.team.broadcast(lambda: plan.attention)
        if plan.networks() == before.networks():
            self.plan = replace(plan, checkpoint=before.checkpoint)
        else:
            self.plan, self._contexts = plan, {}
            self.experts = self.vae = self._text_encoder = None
            free_memory()
        if self.experts is None:
            return
        for model in self.experts.models.values():
            model.use_attention(BACKENDS[self.attention])
        now, then = (each.lora_stacks() for each in (plan, before))
        if now == then:
            return
        merges = self._merges()
        files, files_before = (
            {expert: [(*files, alpha) for *files, _, alpha in stack] for expert, stack in stacks.items()}
            for stacks in (now, then)
        )
        if plan.lora_mode == "merge" and self.experts.networks:
            self.experts.networks.change_loras(merges)
        elif plan.lora_mode == "adapter" and files == files_before and not any(m.deltas for m in merges.values()):
            self.experts.forget_scales()
        else:
            self.experts = None
            free_memory()

    def sample_or_retry(self, video: Video, on_step: OnStep = lambda *_: None, **how: Any) -> Tensor:
        """`sample` by all of the team, in the memory that is free now: other programs come and go between videos.
        After out of memory once more with fewer slots; the numbers do not depend on them."""
        team, kind = self.mesh.team, video_kind(video)

        def attempt(fewer: bool) -> Tensor:
            if self.plan.room is not None:
                room = min(team.gather(memory_now(self.plan)))  # ranks stream alike
                plan = replace(self.plan, room=int(room * FEWER) if fewer else room)
                self.plan = replace(plan, videos={**plan.videos, kind: plan_video(plan, *kind)})
            if fewer and self.experts:
                self.experts.leave()
            return team.all_or_none(lambda: self.sample(video, on_step, **how))

        if self.plan.room is None or not self.plan.offload:
            return attempt(False)
        return retry_smaller(self.progress, "denoise: once more, with fewer blocks on the device", attempt)

    def sample(
        self, video: Video, on_step: OnStep = lambda *_: None, *, again: bool = False, noise: Tensor | None = None,
        schedule: Schedule | None = None,
    ) -> Tensor:  # fmt: skip
        """The final latent, float32 [C, f, h, w] on the device. JobError if it stops being finite.
        again: another video follows, whose first weights are read while this one is decoded. noise: like the latent,
        instead of the seed's. schedule: for the plan's steps, instead of the planned solver's."""
        plan, self._again = self.plan, again
        assert plan.sampling is not None, "a plan with videos has a sampling"
        generator = torch.Generator(plan.noise_device).manual_seed(video.seed)

        def draw(shape: Sequence[int]) -> Tensor:
            """The generator's next numbers, the same on all processes that make this video."""
            return self.mesh.same(torch.randn(shape, generator=generator, device=plan.noise_device).to(plan.device))

        texts, facts = plan.texts(video), plan.video(video)
        steps = plan.steps[facts.first_step :]
        schedule = copy.deepcopy(schedule) or make_schedule(plan.sampling, draw, facts.first_step)  # it keeps state
        self.encode(texts)
        rows = {text: self._contexts[text].to(plan.device) for text in texts}
        negative, guide = Prompt(rows[texts.pop()]) if plan.uses_negative else None, plan.request.guide
        led = negative if guide[0] != 1 else None
        prompts = {text: Prompt(rows[text], led, guide) for text in dict.fromkeys(texts)}
        conditioning = Conditioning(prompts[texts[0]], negative, *self.start(video))
        experts, budget = self.load_experts(), facts.budget
        windows = [(*window, prompts[text]) for window, text in zip(facts.windows, texts, strict=False)]
        denoisers = Windows(experts, windows) if windows else experts
        noise = draw(facts.latent) if noise is None else noise.to(plan.device, torch.float32)
        if noise.shape != facts.latent:
            raise InputError(f"noise: a tensor {list(facts.latent)}, not {list(noise.shape)}")
        forwards = [(step.expert, 1 + step.guided) for step in steps for _ in range(max(1, len(windows)))]
        model, count = plan.transformer, sum(count for _, count in forwards)
        width = model.num_heads * model.head_width
        # the passes between the matrix products are compiled if the run is long enough to gain from it
        fused, note = choose_passes(plan.device, facts.tokens, width, len(model.blocks), count)
        for each in experts.models.values():
            each.use_passes(fused)
        if note:
            self.progress.say(note)
        slots = budget.slots if budget and not budget.resident else None
        # weights that pass through, or are gathered from the other processes, come once for both passes of a step
        batch_guidance = budget.batch_guidance if budget else plan.request.dit_fsdp
        if budget and budget.vae_leaves:
            self.vae = None
            free_memory()
        cache = StepCache(denoisers, steps, plan.request.cache, self.mesh.same) if plan.request.cache else None
        self._made = cache.made if cache else []
        job = experts.job(forwards, slots, batch_guidance, again or not self.offload, known=cache is None)
        with self.progress.stage("denoise", total=len(steps), unit="step"), job:
            latent = denoise(cache or denoisers, noise, conditioning, schedule, steps, on_step)
        if self.offload:
            # decoding needs the memory; where none was counted, all of it
            experts.leave(budget.between if budget and again and plan.room is not None else 0)
        return latent

    def sample_job(self, job: Job, on_step: OnStep = lambda *_: None, **how: Any) -> Tensor:
        """The planned job's final latent. JobError if it stops being finite. how: see `sample`."""

        def read(name: str, path: Path) -> Any:
            fps = self.plan.config.sample_fps
            return read_clip(path, job.frame_num, fps, job.size) if name == "video" else open_image(path)

        given = self.mesh.team.all_or_none(lambda: {n: read(n, path) for n, path in job.pictures.items() if path})
        video = Video(job.prompt, job.negative_prompt, job.size, job.frame_num, job.seed, **given)
        strip = Strip(Beside.of(job.save_file).strip) if self.plan.request.preview_steps else None

        def show(step: Step, sample: Tensor, velocity: Tensor) -> Tensor | None:
            changed = on_step(step, sample, velocity)
            now = velocity if changed is None else changed
            if strip and (frame := self.look(predict_clean(step, sample, now))) is not None:
                strip.add(frame)
            self.progress.advance(1, f"{step}, left out" if self._made and not self._made[-1] else str(step))
            return changed

        return self.sample_or_retry(video, show, **how)

    def computed(self) -> dict[str, list[int]]:
        """For the record of the last video: numbers of the steps that were computed, if some were left out."""
        return {"computed_steps": [n for n, made in enumerate(self._made, 1) if made]} if self._made else {}

    # -- pixels

    def load_vae(self) -> WanVAE | SplitVAE:
        """InputError for a corrupt file."""
        if self.vae is None:
            module, weights = self.plan.checkpoint.vae.module, self.plan.checkpoint.vae.weights
            source = Source(weights, lambda name: module.get_parameter(name).dtype)
            with self._loading("VAE", [source]) as report:
                vae = self.load(module, source, self.plan.device, report, sharded=False)
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

    def decode(self, latent: Tensor, *, finer: bool = False, convert: Convert = AS_IS) -> Generator[Tensor]:
        """Chunks [3, t, H, W] of `convert`ed float32 in [-1, 1], in order; finer: in smaller tiles, same numbers.
        Of processes that make a video together the first gets them; the others must run the iterator and get none."""
        tiles = decode_tiles(self.plan, latent.shape, finer=finer)
        if finer and self.experts and self.offload:
            self.experts.leave()
        beside = self.experts.ahead() if self.experts and self._again else nullcontext()
        with torch.no_grad(), beside:  # the next video's first weights are read meanwhile
            yield from self.load_vae().decode(latent.to(self.plan.device), tiles=tiles, convert=convert)

    def look(self, latent: Tensor) -> Tensor | None:
        """The frame [3, H, W] in the middle of a latent, on the first of the processes; all must call this."""
        middle, tiles = latent.shape[1] // 2, decode_tiles(self.plan, latent.shape)
        with torch.no_grad():
            chunks = list(self.load_vae().decode(latent[:, middle : middle + 1], tiles=tiles))
        return chunks[0][:, 0] if chunks else None

    def info(self) -> dict[str, str]:
        """Machine and numerics, for the record."""
        device, dtype = self.plan.device, dtype_name(self.plan.dtype)
        machine = {"device": f"{device} ({Accelerator(device).name})", "dtype": dtype, "attention": self.attention}
        return machine | {"processes": str(self.plan.layout), "diffusers": version("diffusers")}

    def load(self, module: Module, source: Source, home: torch.device, report: Report, *, sharded: bool) -> Module:
        """`module` with its weights on `home`, or with this process's shards of them."""
        if not sharded or self.mesh.shards is None:
            return load(module, source, home, report)
        from wan.distributed.fsdp import load_sharded  # takes seconds to import

        return load_sharded(module, source, self.mesh, home, report)

    @contextmanager
    def _loading(self, name: str, sources: Iterable[Source], *, sharded: bool = False) -> Iterator[Report]:
        size = sum(entry.bytes for source in sources for entry in source.store.values())
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
