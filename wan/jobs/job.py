"""The outcome of a request: videos to make, prompts to write out, or latents to decode. No torch, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.lora_files import LoraChoice
from lightning.releases import Release
from wan.cli.options import STRENGTH, Request
from wan.configs import TaskConfig
from wan.jobs.prompt_files import Row

if TYPE_CHECKING:
    from wan.prompt_extension.extend import ExtendSettings


@dataclass(frozen=True)
class Weights:
    """Which weights serve: a checkpoint, and what comes on top of it."""

    ckpt_dir: Path | None  # a folder or hub id; None: files alone
    loras: tuple[LoraChoice, ...] = ()  # in the order given; --lora_dir's first
    # by part, what replaces the folder's: a full expert, "vae", "text_encoder" or "tokenizer" (its tokenizer.json)
    files: Mapping[str, Path] = field(default_factory=dict)
    lora_mode: str = "merge"  # or "adapter"
    vae_only: bool = False  # for kept latents
    release: Release | None = None  # whose settings are used, by name or recognised
    distilled: bool = False

    def not_of_folder(self, config: TaskConfig) -> set[str]:
        """The parts that `ckpt_dir` need not have: files of their own serve, or nothing reads them."""
        return {*self.files, *((*config.experts, "text_encoder", "tokenizer") if self.vae_only else ())}


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled."""

    solver: str  # "euler" | "unipc" | "dpm++" | "dmd"
    steps: int
    shift: float
    guidance: tuple[float, float]  # (low noise, high noise); equal for one-model tasks
    timesteps: tuple[float, ...] | None = None  # explicit final timesteps, instead of steps and shift
    high_steps: int | None = None  # explicit count of high-noise steps, instead of the boundary
    lora_steps: tuple[float, ...] | None = None  # LoRA scale by step (motion recipes); None: 1 at every step
    guidance_steps: tuple[float, ...] | None = None  # guidance by step; None: `guidance`
    strength: float = STRENGTH  # share of the steps that a video made from another one takes

    @property
    def first_step(self) -> int:
        """The step that a video made from another one starts at: the first i >= steps * (1 - strength)."""
        return self.steps - int(round(self.steps * self.strength, 6))


@dataclass(frozen=True)
class Job:
    """One video to make. Sizes are (width, height)."""

    index: int  # place in the whole prompt file, times the seeds of each prompt, from 0; see `number`
    prompt: str  # what the text encoder gets
    original_prompt: str  # what the user wrote; differs from `prompt` after prompt extension
    negative_prompt: str
    image: Path | None
    area: tuple[int, int]  # as asked for; with an image only its product counts
    size: tuple[int, int]  # of the video
    frame_num: int
    seed: int
    save_file: Path
    source: str  # where it came from, for messages: "prompts.txt line 3"
    picture: str = ""  # how an image led to `size`, for the plan: "600x400, the area of 832x480"
    last_image: Path | None = None
    video: Path | None = None  # that it is made from
    follows: bool = False  # `image` is the video before it in its chain, whose last frame is its first
    named: bool = False  # the user chose the name of `save_file`
    joined: Path | None = None  # what its chain is joined into; None: it is in none
    variant: int = 0  # which of the run's settings it has, see `Generate.variants`

    @property
    def number(self) -> str:
        """The video's number in plan, progress, messages and file name."""
        return f"{self.index:04d}"

    @property
    def pictures(self) -> dict[str, Path | None]:
        """Every picture, and the clip, that the video may be made from, by the name of its option."""
        return {"image": self.image, "last_image": self.last_image, "video": self.video}


def windows_of(frames: int, window: tuple[int, int] | None) -> list[tuple[int, int]]:
    """First and end of each window's latent frames; none if one holds all. window: see `Request.windows`."""
    length, size = frames // 4 + 1, (window[0] if window else frames) // 4 + 1
    if not window or length <= size:
        return []
    shared = max(1, window[1] // 4)
    last = -(-(length - shared) // (size - shared)) - 1
    return [(first, first + size) for first in (round(n * (length - size) / last) for n in range(last + 1))]


def prompts_by_window(prompt: str, windows: int) -> list[str]:
    """The parts of a prompt, divided by "|", shared out evenly over the windows; all of it without windows."""
    parts = [part.strip() for part in prompt.split("|")] if windows else [prompt]
    return [parts[n * len(parts) // windows] for n in range(windows)] or parts


def chains(jobs: Iterable[Job]) -> list[list[Job]]:
    """Units of work in order: the clips of a chain, or one video that is in none."""
    found: dict[Path, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.joined or job.save_file, []).append(job)
    return list(found.values())


def frames_joined(chain: Sequence[Job]) -> int:
    """Frames of the video that a chain is joined into: two neighbours share one."""
    return sum(job.frame_num for job in chain) - (len(chain) - 1)


@dataclass(frozen=True)
class Replayed:
    """A record that is replayed. others: options that were given anew, or depend on those."""

    path: Path
    record: Mapping[str, Any]
    others: frozenset[str]


@dataclass(frozen=True)
class Generate:
    """Videos to make."""

    request: Request  # with the record of --replay on it, and the seed drawn
    config: TaskConfig
    weights: Weights
    sampling: Sampling
    jobs: tuple[Job, ...]
    extend: ExtendSettings | None = None  # None: prompts are used as they are
    warnings: tuple[str, ...] = ()
    replayed: Replayed | None = None
    variants: Mapping[int, Generate] = field(default_factory=dict)  # by number, where jobs differ in their settings


@dataclass(frozen=True)
class Extend:
    """Prompts to write out into a file, and no more."""

    request: Request
    rows: tuple[Row, ...]
    extend: ExtendSettings
    file: Path
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decode:
    """Kept latents to make a video of."""

    request: Request
    config: TaskConfig
    weights: Weights
    latents: Path
    video: Path
    warnings: tuple[str, ...] = ()


Outcome = Generate | Extend | Decode
