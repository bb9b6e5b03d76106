"""What the user asked for, and what it resolves to. No torch, no weights: only words, numbers and paths.

`Request` holds the flags as given (None = not given). `resolve` fills every default, reads prompt files and image
lists, makes every check that needs no weight, and returns a `Run`: the settings of the whole run and its jobs.
All problems are collected into one `InputError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoraChoice:
    """One LoRA file for one expert ("high", "low" or "model"), at a strength."""

    expert: str
    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run share; every default filled."""

    task: str
    ckpt_dir: Path
    loras: tuple[LoraChoice, ...]  # in the order given; --lora_dir's first
    lora_mode: str  # "merge" | "adapter"
    lora_allow_partial: bool
    lora_alpha: float | None  # alpha for files that carry none; None: the release's, else the rank
    expert_files: dict[str, Path]  # full (distilled) weight files that replace an expert's
    preset: str | None  # name of the release whose settings are used
    solver: str  # "euler" | "unipc" | "dpm++"
    steps: int
    shift: float
    guidance: tuple[float, float]  # (low noise, high noise); equal for one-model tasks
    timesteps: tuple[float, ...] | None  # explicit final timesteps, 1000 first
    high_steps: int | None  # explicit number of high-noise steps
    lora_steps: tuple[float, ...] | None  # LoRA scale by step (motion recipes); None: 1 at every step
    guidance_steps: tuple[float, ...] | None  # guidance by step; None: `guidance`
    device: str  # "auto" | "cuda" | "cuda:1" | "cpu" | "mps"
    dtype: str  # "auto" | "bf16" | "fp32"
    attention: str  # "auto" or a back end's name
    noise_device: str  # "auto" (the compute device) | "cpu"
    offload_model: bool
    t5_cpu: bool
    convert_model_dtype: bool
    vae_tiling: bool
    t5_fsdp: bool
    dit_fsdp: bool
    ulysses_size: int
    ring_size: int
    save_latents: bool
    preview: bool
    overwrite: bool
    resume: bool
    on_error: str  # "continue" | "stop"


@dataclass(frozen=True)
class Job:
    """One video to make."""

    index: int  # from 0, over the whole run
    prompt: str  # what the text encoder gets
    original_prompt: str  # what the user wrote; differs from `prompt` after prompt extension
    negative_prompt: str
    image: Path | None
    size: tuple[int, int]  # width, height; with an image an area
    frame_num: int
    seed: int
    save_file: Path
    source: str  # where it came from, for messages: "prompts.txt line 3"


@dataclass(frozen=True)
class Run:
    settings: Settings
    jobs: tuple[Job, ...]
