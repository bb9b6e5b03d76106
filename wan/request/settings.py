"""What the user asked for, and what it resolves to. No torch, no weights: only words, numbers and paths.

`Request` holds the flags as given; `resolve` turns it into a `Run`: the settings of the whole run and its jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.choice import LoraChoice
from wan.request.prompts import Row

if TYPE_CHECKING:
    from wan.extend.extension import ExtendSettings


@dataclass(frozen=True)
class Request:
    """The flags of generate.py as given; None where one was not. Words with structure (sizes, lists) stay words."""

    task: str | None = None
    size: str | None = None  # "W*H" or "WxH"
    frame_num: int | None = None
    seconds: float | None = None
    prompt: str | None = None
    image: str | None = None
    prompt_file: str | None = None
    image_path_file: str | None = None
    negative_prompt: str | None = None
    base_seed: int | None = None
    num_videos: int | None = None
    ckpt_dir: str | None = None
    lora_dir: str | None = None
    lora_strength: str | None = None  # "HIGH" or "HIGH,LOW"
    lora: tuple[str, ...] | None = None
    lora_alpha: float | None = None
    lora_allow_partial: bool | None = None
    lora_mode: str | None = None
    expert: tuple[str, ...] | None = None
    preset: str | None = None
    sample_solver: str | None = None
    sample_steps: int | None = None
    sample_shift: float | None = None
    sample_guide_scale: str | None = None  # "S" or "LOW,HIGH"
    timesteps: str | None = None  # "1000,937.5,..."
    high_steps: int | None = None
    noise_device: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    offload_model: bool | None = None
    t5_cpu: bool | None = None
    convert_model_dtype: bool | None = None
    vae_tiling: bool | None = None
    t5_fsdp: bool | None = None
    dit_fsdp: bool | None = None
    ulysses_size: int | None = None
    ring_size: int | None = None
    use_prompt_extend: bool | None = None
    prompt_extend_method: str | None = None
    prompt_extend_model: str | None = None
    prompt_extend_target_lang: str | None = None
    prompt_extend_on_error: str | None = None
    no_extend_cache: bool | None = None
    extend_only: str | None = None
    save_dir: str | None = None
    save_file: str | None = None
    save_latents: bool | None = None
    preview: bool | None = None
    decode_latents: str | None = None
    overwrite: bool | None = None
    resume: bool | None = None
    on_error: str | None = None
    replay: str | None = None
    dry_run: bool | None = None
    json: bool | None = None
    debug: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """What was given, as JSON takes it."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], problems: list[str]) -> Request:
        """From words (flags) or JSON values (a record); what cannot be read is left out and noted in `problems`."""
        known = {item.name: str(item.type) for item in fields(cls)}
        read: dict[str, Any] = {}
        for name, value in values.items():
            if value is None:
                continue
            if name not in known:
                problems.append(f"{name!r} is not a setting of this program")
                continue
            convert, wanted = READERS[known[name]]
            try:
                read[name] = convert(value)
            except (TypeError, ValueError):
                problems.append(f"--{name} takes {wanted}, not {value!r}")
        return cls(**read)


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled."""

    solver: str  # "euler" | "unipc" | "dpm++" | "dmd"
    steps: int
    shift: float
    guidance: tuple[float, float]  # (low noise, high noise); equal for one-model tasks
    timesteps: tuple[float, ...] | None = None  # explicit final timesteps, in place of steps and shift
    high_steps: int | None = None  # explicit count of high-noise steps, in place of the boundary
    lora_steps: tuple[float, ...] | None = None  # LoRA scale by step (motion recipes); None: 1 at every step
    guidance_steps: tuple[float, ...] | None = None  # guidance by step; None: `guidance`


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """What all jobs of a run share; every default filled."""

    task: str
    ckpt_dir: Path
    loras: tuple[LoraChoice, ...]  # in the order given; --lora_dir's first
    lora_mode: str  # "merge" | "adapter"
    lora_allow_partial: bool
    lora_alpha: float | None  # alpha for files that carry none; None: the release's, else the rank
    expert_files: dict[str, Path]  # full (distilled) weight files that replace an expert's
    preset: str | None  # name of the release whose settings are used
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
    """All that a run needs to know. Either jobs, or prompts to extend, or latents to decode."""

    settings: Settings
    jobs: tuple[Job, ...]
    warnings: tuple[str, ...] = ()
    request: dict[str, Any] = field(default_factory=dict)  # `Request.as_dict()` with the seed drawn; for records
    rows: tuple[Row, ...] = ()  # the prompts that the jobs come from
    extend: ExtendSettings | None = None  # None: prompts are used as they are
    extend_only: Path | None = None
    decode: tuple[Path, Path] | None = None  # (latents, video)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(map(_text, value))


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return int(value)


def _real(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return float(value)


def _truth(value: object) -> bool:
    words = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    words |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    key = str(value).lower()
    if key not in words:
        raise ValueError
    return words[key]


# By a field's annotation: what reads it, and what it takes.
READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str | None": (_text, "text"),
    "tuple[str, ...] | None": (_texts, "a list of texts"),
    "int | None": (_whole, "a whole number"),
    "float | None": (_real, "a number"),
    "bool | None": (_truth, "True or False"),
}
