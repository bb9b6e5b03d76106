"""The options of generate.py: one row each, from which parser, help, README, records, --replay and --resume come.

A `Request` holds one value a row, as given; where nothing was given, the row's default. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from wan.cli.values import absolute, path, paths, real, text, truth, whole
from wan.configs import TASKS
from wan.prompt_extension import LANGUAGES, METHODS, ON_ERROR

Value = TypeVar("Value")


class Scope(Enum):
    """What an option has a say in."""

    VIDEO = "what the video looks like"  # compared by --resume, taken over by --replay
    HOW = "how it is made"  # taken over by --replay
    START = "this start of the program alone"


VIDEO, HOW, START = Scope
LARGEST_SEED = 2**63 - 1
SCHEMA = 2  # of records, which hold requests


@dataclass(frozen=True)
class Option:
    """What a row says besides its name and default.

    takes: the placeholder in the help; "" for a switch, "[...]" where the value may be left out.
    into: the option whose value says what this one comes to (a prompt file is compared by the prompt).
    displaces: what a record says of these no longer counts once this option is given beside --replay.
    needs: it has no effect without any of these; beaten_by: nor beside this one.
    idle_on: nor on this device, or in this dtype.
    """

    group: str
    scope: Scope
    read: Callable[[Any], Any]
    takes: str
    help: str
    choices: tuple[str, ...] = ()
    pattern: str = ""  # further legal values beside `choices`
    limits: tuple[float, float] | None = None
    into: str = ""
    displaces: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    beaten_by: str = ""
    idle_on: str = ""


def option(
    group: str,
    scope: Scope,
    read: Callable[[Any], Value],
    takes: str,
    help: str,
    default: Any = None,
    **more: Any,
) -> Any:
    """A row of the table. The default of a choice is the first one, of a switch False."""
    row = Option(group, scope, read, takes, help, **more)
    if default is None and row.choices:
        default = row.choices[0]
    if default is None and not takes:
        default = False
    return dataclasses.field(default=default, metadata={"option": row})


MAKE, WEIGHTS, SAMPLING = "what to make", "weights", "sampling"
MACHINE, EXTENSION, OUTPUT = "machine", "prompt extension", "output"
EXTENDS = ("use_prompt_extend", "extend_only")  # what extends prompts


@dataclass(frozen=True)
class Request:
    """What was asked for. Words with structure (sizes, lists of numbers) stay words; None: not given."""

    # fmt: off
    task: str = option(MAKE, VIDEO, text, "TASK", "t2v-A14B (default), i2v-A14B or ti2v-5B", choices=tuple(TASKS))
    prompt: str | None = option(MAKE, VIDEO, text, "TEXT", "what the video shows; default: the task's example")
    image: str | None = option(MAKE, VIDEO, path, "FILE",
        "the first frame (i2v-A14B, ti2v-5B); one serves every prompt")
    last_image: str | None = option(MAKE, VIDEO, path, "FILE",
        "the last frame (i2v-A14B), squeezed to the video's size; one serves every prompt")
    prompt_file: str | None = option(MAKE, VIDEO, path, "FILE",
        "a .txt with a prompt a line, or a .jsonl/.csv with rows of prompt, image, last_image, negative_prompt, "
        "seed, size, frame_num, save_file (inside --save_dir)", into="prompt",
        displaces=("prompt", "image", "last_image", "negative_prompt"))
    chain: bool = option(MAKE, START, truth, "",
        "rows of --prompt_file follow each other: one without an image starts from the last frame of the row before; "
        "joined into one .mp4 too")
    image_path_file: str | None = option(MAKE, VIDEO, path, "FILE",
        "an image path a line, paired one to one with the prompts", into="image", displaces=("image",))
    negative_prompt: str | None = option(MAKE, VIDEO, text, "TEXT",
        "what guidance leads away from; default: the model's own")
    size: str | None = option(MAKE, VIDEO, text, "W*H",
        "or WxH, or 480p, 720p, 480p-portrait, 720p-portrait; default 1280*720 (5B: 1280*704); with an image its area "
        "counts")
    frame_num: int | None = option(MAKE, VIDEO, whole, "N", "4n+1 frames; default 81 (5B: 121)")
    seconds: float | None = option(MAKE, VIDEO, real, "X",
        "in place of --frame_num: the nearest length at the model's frame rate", limits=(0.01, 600), into="frame_num",
        displaces=("frame_num",))
    base_seed: int = option(MAKE, VIDEO, whole, "N", "seed of every prompt; default -1: drawn once", default=-1,
        limits=(-LARGEST_SEED, LARGEST_SEED))
    num_videos: int = option(MAKE, START, whole, "N", "videos for each prompt, with seeds base, base+1, ...", default=1,
        limits=(1, 100_000))

    ckpt_dir: str | None = option(WEIGHTS, VIDEO, path, "DIR",
        "a checkpoint, as released or in diffusers' layout: a folder, or on the hub, owner/name[@revision]")
    lora_dir: str | None = option(WEIGHTS, VIDEO, path, "DIR",
        "Lightning release: a folder, also on the hub (owner/name/folder), with one LoRA for each expert",
        into="ckpt_dir", displaces=("lora_strength", "preset"))
    lora_strength: str | None = option(WEIGHTS, VIDEO, text, "HIGH[,LOW]", "scales --lora_dir; default 1",
        into="ckpt_dir")
    lora: tuple[str, ...] | None = option(WEIGHTS, VIDEO, paths, "LORA",
        "PATH[:S], high=PATH[:S] or low=PATH[:S]: a LoRA at strength S, on top of --lora_dir", into="ckpt_dir")
    lora_alpha: float | None = option(WEIGHTS, VIDEO, real, "A", "alpha of LoRA files that store none",
        limits=(1e-3, 1e4), needs=("lora_dir", "lora"))
    lora_allow_partial: bool = option(WEIGHTS, HOW, truth, "", "accept LoRA files with names that fit nothing",
        needs=("lora_dir", "lora"))
    lora_mode: str | None = option(WEIGHTS, VIDEO, text, "MODE",
        "merge (default) into the weights, or adapter: kept apart", needs=("lora_dir", "lora", "preset"))
    expert: tuple[str, ...] | None = option(WEIGHTS, VIDEO, paths, "EXPERT",
        "high=FILE, low=FILE or model=FILE: a full (distilled) weight, safetensors or GGUF, in place of that expert",
        into="ckpt_dir")
    vae: str | None = option(WEIGHTS, VIDEO, path, "FILE", "a video autoencoder in place of the checkpoint's",
        into="ckpt_dir")
    text_encoder: str | None = option(WEIGHTS, VIDEO, path, "FILE",
        "a UMT5 encoder, safetensors, .pth or GGUF, in place of the checkpoint's", into="ckpt_dir")
    tokenizer: str | None = option(WEIGHTS, VIDEO, path, "DIR",
        "a folder with tokenizer.json in place of the checkpoint's", into="ckpt_dir")
    preset: str | None = option(WEIGHTS, VIDEO, text, "NAME",
        "settings of a published release; default: told from the names of the weights", into="sample_steps")

    sample_solver: str | None = option(SAMPLING, VIDEO, text, "SOLVER",
        "euler, unipc, dpm++ or dmd; default unipc, with a distilled weight its own", displaces=("timesteps",))
    sample_steps: int | None = option(SAMPLING, VIDEO, whole, "N", "default 40 (5B: 50), with a distilled weight 4",
        limits=(1, 1000), displaces=("timesteps",))
    sample_shift: float | None = option(SAMPLING, VIDEO, real, "S",
        "timestep shift; default 12, 5, 5 by task, with a distilled weight 5", limits=(0.01, 100),
        displaces=("timesteps",))
    sample_guide_scale: str | None = option(SAMPLING, VIDEO, text, "S|LOW,HIGH",
        "default 3,4 / 3.5 / 5 by task, with a distilled weight 1 (none)")
    timesteps: str | None = option(SAMPLING, VIDEO, text, "T,T,T",
        "final timesteps, after the shift, such as 1000,937.5,833.33,625",
        displaces=("sample_steps", "sample_shift", "sample_solver"))
    high_steps: int | None = option(SAMPLING, VIDEO, whole, "N",
        "steps of the high-noise expert; default: by the model's boundary", limits=(0, 1000))
    noise_device: str = option(SAMPLING, VIDEO, text, "DEVICE",
        "auto (where the model runs) or cpu: the same noise on every machine", choices=("auto", "cpu"))

    device: str = option(MACHINE, VIDEO, text, "DEVICE", "auto, cuda, cuda:N, cpu or mps",
        choices=("auto", "cuda", "cpu", "mps"), pattern=r"cuda:\d{1,3}")
    dtype: str = option(MACHINE, VIDEO, text, "DTYPE", "auto (bf16, on a CPU fp32), bf16 or fp32",
        choices=("auto", "bf16", "fp32"))
    quantize: str = option(MACHINE, VIDEO, text, "WHAT",
        "none (default), or fp8: the experts' weights in 8 bits, but for the first and last blocks'",
        choices=("none", "fp8"))
    attention: str = option(MACHINE, VIDEO, text, "NAME",
        "auto, sdpa, flash, cudnn, flash2, flash3, or sage: in 8 bits, which changes the numbers and is never auto",
        choices=("auto", "sdpa", "flash", "cudnn", "flash2", "flash3", "sage"))
    vae_dtype: str = option(MACHINE, VIDEO, text, "DTYPE",
        "fp32 (default) or bf16, of the decode: less time and memory, 47 to 61 dB from fp32",
        choices=("fp32", "bf16"))
    offload_model: bool | None = option(MACHINE, HOW, truth, "[BOOL]",
        "hold on the GPU what there is room for, read the rest when needed; default True, under torchrun False",
        idle_on="cpu")
    vram: float | None = option(MACHINE, HOW, real, "GB",
        "use so much of the GPU's memory and no more; default: what is free", limits=(0.001, 10_000))
    t5_cpu: bool = option(MACHINE, HOW, truth, "", "run the text encoder on the CPU", idle_on="cpu")
    convert_model_dtype: bool = option(MACHINE, VIDEO, truth, "",
        "cast every parameter, also those kept in float32 otherwise", idle_on="float32")
    vae_tiling: bool = option(MACHINE, HOW, truth, "", "decode in tiles: less memory")
    t5_fsdp: bool = option(MACHINE, START, truth, "", "shard the text encoder over the processes (torchrun)")
    dit_fsdp: bool = option(MACHINE, START, truth, "", "shard the experts over the processes (torchrun)")
    ulysses_size: int = option(MACHINE, START, whole, "N",
        "processes that share one video's attention heads (torchrun)", default=1, limits=(1, 1024))
    ring_size: int = option(MACHINE, START, whole, "N", "processes that share one video's tokens in a ring (torchrun)",
        default=1, limits=(1, 1024))

    use_prompt_extend: bool = option(EXTENSION, VIDEO, truth, "",
        "have a language model write the prompts out first", into="prompt")
    prompt_extend_method: str = option(EXTENSION, VIDEO, text, "METHOD", "local_qwen (default), dashscope or openai",
        choices=METHODS, into="prompt", needs=EXTENDS)
    prompt_extend_model: str | None = option(EXTENSION, VIDEO, text, "MODEL", "default: by method and task",
        into="prompt", needs=EXTENDS)
    prompt_extend_target_lang: str = option(EXTENSION, VIDEO, text, "LANG", "zh (default) or en", choices=LANGUAGES,
        into="prompt", needs=EXTENDS)
    prompt_extend_on_error: str = option(EXTENSION, START, text, "WHAT",
        "raw (default): keep the prompt, with a warning; or fail", choices=ON_ERROR, needs=EXTENDS)
    no_extend_cache: bool = option(EXTENSION, START, truth, "", "ask again for prompts that were extended before",
        needs=EXTENDS)
    extend_only: str | None = option(EXTENSION, START, path, "FILE",
        "write the extended prompts to a .txt or .jsonl file and stop")

    shard: str | None = option(OUTPUT, START, text, "I/N",
        "make every N-th video of the prompt file, from the I-th on; default: this task's place in a Slurm array")
    save_dir: str = option(OUTPUT, START, path, "DIR", "default outputs", default="outputs", beaten_by="save_file")
    save_file: str | None = option(OUTPUT, START, path, "FILE", "exact name of the .mp4 (one video only)")
    save_latents: bool = option(OUTPUT, HOW, truth, "", "keep the final latents beside the video")
    decode_latents: str | None = option(OUTPUT, START, path, "FILE", "only decode latents that were kept")
    preview: bool = option(OUTPUT, HOW, truth, "", "a contact sheet PNG beside the video")
    gallery: bool = option(OUTPUT, START, truth, "", "after the run, a page index.html over the videos of --save_dir")
    preview_steps: bool = option(OUTPUT, HOW, truth, "",
        "after each step a frame of the video as it will be, in a PNG strip (.steps.png) beside it")
    overwrite: bool = option(OUTPUT, START, truth, "", "replace files that exist")
    resume: bool = option(OUTPUT, START, truth, "", "skip videos that are finished")
    on_error: str = option(OUTPUT, START, text, "WHAT", "continue (default) with the other videos, or stop",
        choices=("continue", "stop"))
    replay: str | None = option(OUTPUT, START, path, "FILE",
        "take every setting from the record (.json or .mp4) of a video; other flags override")
    dry_run: bool = option(OUTPUT, START, truth, "", "check everything, print the plan, make nothing")
    json: bool = option(OUTPUT, START, truth, "", "plan and progress as JSON lines on stdout")
    debug: bool = option(OUTPUT, START, truth, "", "tracebacks with errors")
    # fmt: on

    def as_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON takes it."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) != DEFAULTS[name]}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}

    def recorded(self) -> dict[str, Any]:
        """`as_dict` for a record: files that are here by their absolute paths, so that it can be read elsewhere."""
        given = self.as_dict()
        return {name: absolute(v) if OPTIONS[name].read in (path, paths) else v for name, v in given.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], problems: list[str]) -> Request:
        """From words or JSON values (a record); what cannot be read is left out and noted in `problems`."""
        given = {name: value for name, value in values.items() if value is not None}
        reads = {name: read(name, value, problems) for name, value in given.items() if name in OPTIONS}
        problems.extend(f"{name!r} is not a setting of this program" for name in given if name not in OPTIONS)
        return cls(**{name: value for name, value in reads.items() if value is not None})


OPTIONS: dict[str, Option] = {row.name: row.metadata["option"] for row in dataclasses.fields(Request)}
DEFAULTS: dict[str, Any] = {row.name: row.default for row in dataclasses.fields(Request)}


def read(name: str, value: object, problems: list[str]) -> Any:
    """The value of option `name`; None, and a problem, if it cannot be read."""
    row = OPTIONS[name]
    try:
        return row.read(value)
    except (TypeError, ValueError, OverflowError):
        shown = f"{value!r}"[:80]
        problems.append(f"--{name} takes {row.read.__doc__}, not {shown}")
        return None
