"""The options of generate.py: one row each, from which parser, help, README, records, --replay and --resume come."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from wan.configs import TASKS, TaskConfig
from wan.prompt_extension import LANGUAGES, METHODS, ON_ERROR

Number = TypeVar("Number", int, float)


class Scope(Enum):
    """The stage that an option affects."""

    VIDEO = "what the video looks like"  # compared by --resume, taken over by --replay
    HOW = "how it is made"  # taken over by --replay
    START = "this start of the program alone"


VIDEO, HOW, START = Scope
LARGEST_SEED = 2**63 - 1
SCHEMA = 2  # of records, which hold requests


# Readers of a word or a JSON value; their docstrings say what they take. TypeError, ValueError, OverflowError.


def text(value: object) -> str:
    """text"""
    if not isinstance(value, str):
        raise TypeError
    return value


def path(value: object) -> str:
    """a path"""
    return text(value)


def paths(value: object) -> tuple[str, ...]:
    """a list of texts"""
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(map(text, value))


def whole(value: object) -> int:
    """a whole number"""
    return _number(value, int)


def real(value: object) -> float:
    """a number"""
    return _number(value, float)


def _number(value: Any, kind: type[Number]) -> Number:
    # `1_0`, which Python reads as 10, is a slip
    if isinstance(value, bool) or not isinstance(value, str | int | kind) or (isinstance(value, str) and "_" in value):
        raise TypeError
    return kind(value)


def numbers(value: object) -> str:
    """numbers with commas between"""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return ",".join(f"{_number(part, float):.12g}" for part in parts)


def wholes(value: object) -> str:
    """whole numbers with commas between"""
    return ",".join(str(_number(part, int)) for part in str(value).split(","))


def truth(value: object) -> bool:
    """True or False"""
    word, yes = str(value).lower(), ("true", "yes", "t", "y", "1")
    if word not in (*yes, "false", "no", "f", "n", "0"):
        raise ValueError
    return word in yes


@dataclass(frozen=True)
class Option:
    """One row, besides its name and default."""

    group: str
    scope: Scope
    read: Callable[[Any], Any]
    takes: str  # the placeholder in the help; "" for a switch, "[...]" where the value may be left out
    help: str
    example: str | None = None  # a value for the short help, "" for a switch; None: it is in `--help all` only
    choices: tuple[str, ...] = ()
    pattern: str = ""  # further legal values beside `choices`
    limits: tuple[float, float] | None = None
    into: str = ""  # the option that this one ends in (a prompt file is compared by the prompt)
    displaces: tuple[str, ...] = ()  # options of a record that no longer count once this one is beside --replay
    needs: tuple[str, ...] = ()  # without any of these it has no effect
    beaten_by: str = ""  # beside this one it has no effect
    counts_with: tuple[str, ...] = ()  # which of MODES, starts that make no video from a prompt, it affects


def option(
    group: str, scope: Scope, read: Callable[[Any], Any], takes: str, help: str, default: Any = None, **more: Any
) -> Any:
    # the default of a choice is its first value, of a switch False
    row = Option(group, scope, read, takes, help, **more)
    if default is None:
        default = row.choices[0] if row.choices else None if takes else False
    return dataclasses.field(default=default, metadata={"option": row})


def by_task(fact: Callable[[TaskConfig], object]) -> str:
    """`default 81 (ti2v-5B: 121)`, from the facts of the tasks."""
    values = {name: str(fact(config)) for name, config in TASKS.items()}
    usual, _ = Counter(values.values()).most_common(1)[0]
    others = ", ".join(f"{name}: {value}" for name, value in values.items() if value != usual)
    return f"default {usual}{f' ({others})' if others else ''}"


def _guidance(config: TaskConfig) -> str:
    scale = config.sample_guide_scale
    return ",".join(f"{each:g}" for each in dict.fromkeys(scale if isinstance(scale, tuple) else (scale,)))


MAKE, WEIGHTS, SAMPLING = "what to make", "weights", "sampling"
MACHINE, EXTENSION, OUTPUT = "machine", "prompt extension", "output"
DECODE, EXTEND = ("decode_latents",), ("extend_only",)
MODES = DECODE + EXTEND
EXTENDS = ("use_prompt_extend", "extend_only")  # options that extend prompts
LORAS = ("lora_dir", "lora")
QUALITIES: dict[str, dict[str, Any]] = {  # what --quality sets of the options that are not given
    "exact": {}, "high": {"vae_dtype": "bf16"}, "fast": {"vae_dtype": "bf16", "quantize": "auto", "cache": 0.05},
}  # fmt: skip
WITH_IMAGE = " and ".join(name for name, config in TASKS.items() if config.image_fit)
WITH_LAST_IMAGE = " and ".join(name for name, config in TASKS.items() if config.mask_channels)
WITH_VIDEO = " and ".join(name for name, config in TASKS.items() if not config.mask_channels)
STRENGTH = 0.75
NAG = (1.0, 2.5, 0.25)  # scale (1: off), tau and alpha of `--nag`
SOLVERS = ("euler", "unipc", "dpm++", "dmd")
EXPLICIT = ("euler", "dmd")  # those that visit any list of timesteps
SIZE_NAMES = ", ".join(dict.fromkeys(name for config in TASKS.values() for name in config.sizes_by_name()))


@dataclass(frozen=True)
class Request:
    """The options given. Words with structure (sizes, lists of numbers) stay words; None: not given."""

    # fmt: off
    task: str = option(MAKE, VIDEO, text, "TASK", f"{', '.join(TASKS)}; default {next(iter(TASKS))}",
        choices=tuple(TASKS), counts_with=MODES, example="i2v-A14B")
    prompt: str | None = option(MAKE, VIDEO, text, "TEXT", "what the video shows; default: the task's example",
        counts_with=EXTEND, example='"a red fox in the snow"')
    image: str | None = option(MAKE, VIDEO, path, "FILE", f"the first frame ({WITH_IMAGE}); one serves every prompt",
        counts_with=EXTEND, example="photo.jpg")
    last_image: str | None = option(MAKE, VIDEO, path, "FILE",
        f"the last frame ({WITH_LAST_IMAGE}), squeezed to the video's size; one serves every prompt",
        counts_with=EXTEND)
    video: str | None = option(MAKE, VIDEO, path, "FILE",
        f"a video to make this one from ({WITH_VIDEO}), scaled and cropped to --size; one serves every prompt",
        counts_with=EXTEND)
    prompt_file: str | None = option(MAKE, VIDEO, path, "FILE",
        "a .txt with one prompt per line, or a .jsonl/.csv/.tsv with rows of prompt, image, last_image, "
        "video, negative_prompt, seed, size, frame_num, save_file (inside --save_dir)", into="prompt",
        displaces=("prompt", "image", "last_image", "video", "negative_prompt"), counts_with=EXTEND,
        example="prompts.csv")
    chain: bool = option(MAKE, START, truth, "",
        "rows of --prompt_file continue each other: a row without an image starts from the last frame of the row "
        "before; the clips are joined into one .mp4 too")
    image_path_file: str | None = option(MAKE, VIDEO, path, "FILE",
        "one image path per line, paired one to one with the prompts", into="image", displaces=("image",),
        counts_with=EXTEND)
    negative_prompt: str | None = option(MAKE, VIDEO, text, "TEXT", "what to avoid; default: the model's own",
        example='"blurry, text"')
    size: str | None = option(MAKE, VIDEO, text, "W*H",
        f"width and height, or {SIZE_NAMES}; {by_task(lambda task: task.sizes[0])}; with an image its area counts",
        example="832x480")
    frame_num: int | None = option(MAKE, VIDEO, whole, "N", f"4n+1 frames; {by_task(lambda task: task.frame_num)}",
        example="49")
    seconds: float | None = option(MAKE, VIDEO, real, "X",
        "instead of --frame_num: the nearest length at the model's frame rate", limits=(0.01, 600), into="frame_num",
        displaces=("frame_num",))
    base_seed: int = option(MAKE, VIDEO, whole, "N", "seed of every prompt; default -1: drawn once", default=-1,
        limits=(-LARGEST_SEED, LARGEST_SEED), counts_with=EXTEND, example="42")
    num_videos: int = option(MAKE, START, whole, "N", "videos for each prompt, with seeds base, base+1, ...", default=1,
        limits=(1, 100_000), example="4")

    sweep: tuple[str, ...] | None = option(MAKE, START, paths, "NAME=V,V",
        "make every video with each of these values of an option, such as lora_strength=0.5,1; several multiply out; "
        "';' separates values that hold commas", example="base_seed=1,2")

    ckpt_dir: str | None = option(WEIGHTS, VIDEO, path, "DIR",
        "a checkpoint, as released or in diffusers' layout: a folder, or on the hub, owner/name[@revision]",
        counts_with=DECODE, example="./Wan2.2-T2V-A14B")
    lora_dir: str | None = option(WEIGHTS, VIDEO, path, "DIR",
        "Lightning release: a folder, also on the hub (owner/name/folder), with one LoRA for each expert",
        into="ckpt_dir", displaces=("lora_strength", "preset"), example="./Wan2.2-Lightning/Wan2.2-T2V-A14B-4steps")
    lora_strength: str | None = option(WEIGHTS, VIDEO, text, "HIGH[,LOW]", "scales --lora_dir; default 1",
        into="ckpt_dir")
    lora: tuple[str, ...] | None = option(WEIGHTS, VIDEO, paths, "LORA",
        "PATH[:S], high=PATH[:S] or low=PATH[:S]: a LoRA at strength S, on top of --lora_dir", into="ckpt_dir",
        example="style.safetensors:0.8")
    lora_alpha: float | None = option(WEIGHTS, VIDEO, real, "A", "alpha of LoRA files that store none",
        limits=(1e-3, 1e4), needs=LORAS)
    lora_allow_partial: bool = option(WEIGHTS, HOW, truth, "", "accept LoRA files with names that fit nothing",
        needs=LORAS)
    lora_mode: str | None = option(WEIGHTS, VIDEO, text, "MODE",
        "merge (default) into the weights, or adapter: kept apart", needs=(*LORAS, "preset"))
    expert: tuple[str, ...] | None = option(WEIGHTS, VIDEO, paths, "EXPERT",
        "high=FILE, low=FILE or model=FILE: a full (distilled) weight, safetensors or GGUF, instead of that expert",
        into="ckpt_dir", counts_with=DECODE)
    vae: str | None = option(WEIGHTS, VIDEO, path, "FILE", "a video autoencoder instead of the checkpoint's",
        into="ckpt_dir", counts_with=DECODE)
    text_encoder: str | None = option(WEIGHTS, VIDEO, path, "FILE",
        "a UMT5 encoder, safetensors, .pth or GGUF, instead of the checkpoint's", into="ckpt_dir", counts_with=DECODE)
    tokenizer: str | None = option(WEIGHTS, VIDEO, path, "DIR",
        "a folder with tokenizer.json instead of the checkpoint's", into="ckpt_dir", counts_with=DECODE)
    preset: str | None = option(WEIGHTS, VIDEO, text, "NAME",
        "settings of a published release; default: recognised by the names of the weights", into="sample_steps")

    sample_solver: str | None = option(SAMPLING, VIDEO, text, "SOLVER",
        f"{', '.join(SOLVERS)}; {by_task(lambda task: task.sample_solver)}, with a distilled weight its own",
        displaces=("timesteps",))
    sample_steps: int | None = option(SAMPLING, VIDEO, whole, "N",
        f"{by_task(lambda task: task.sample_steps)}, with a distilled weight its own", limits=(1, 1000),
        displaces=("timesteps",), example="20")
    sample_shift: float | None = option(SAMPLING, VIDEO, real, "S",
        f"timestep shift; {by_task(lambda task: f'{task.sample_shift:g}')}, with a distilled weight its own",
        limits=(0.01, 100), displaces=("timesteps",))
    sample_guide_scale: str | None = option(SAMPLING, VIDEO, text, "S|LOW,HIGH",
        f"guidance; {by_task(_guidance)}, with a distilled weight its own (1: none)", example="3.5")
    nag: str = option(SAMPLING, VIDEO, numbers, "S[,TAU,ALPHA]",
        "without guidance, attention leads away from the negative prompt at scale S, published: 11,2.5,0.25; "
        "default 1: off", default="1")
    cache: float = option(SAMPLING, VIDEO, real, "T",
        "leave out steps while the velocity's predicted change stays below T, published: 0.05; default 0: off",
        default=0.0, limits=(0, 1))
    timesteps: str | None = option(SAMPLING, VIDEO, text, "T,T,T",
        "final timesteps, after the shift, such as 1000,937.5,833.33,625",
        displaces=("sample_steps", "sample_shift", "sample_solver"))
    high_steps: int | None = option(SAMPLING, VIDEO, whole, "N",
        "steps of the high-noise expert; default: by the model's boundary", limits=(0, 1000))
    window: str | None = option(SAMPLING, VIDEO, wholes, "N[,OVERLAP]",
        f"4n+1 frames that the model has at a time ({WITH_VIDEO}, no image), in a longer video: windows that share "
        "OVERLAP frames, a quarter by default, are blended; 'first | second' are prompts one after the other",
        example="81")
    strength: float | None = option(SAMPLING, VIDEO, real, "S",
        f"how far --video is changed: the share of the steps that are run; default {STRENGTH:g}", limits=(0.001, 1),
        into="sample_steps")
    noise_device: str = option(SAMPLING, VIDEO, text, "DEVICE",
        "auto (where the model runs) or cpu: the same noise on every machine", choices=("auto", "cpu"))

    device: str = option(MACHINE, VIDEO, text, "DEVICE", "auto, cuda, cuda:N, cpu or mps",
        choices=("auto", "cuda", "cpu", "mps"), pattern=r"cuda:\d{1,3}", counts_with=MODES)
    dtype: str = option(MACHINE, VIDEO, text, "DTYPE", "auto (bf16, on a CPU fp32), bf16 or fp32",
        choices=("auto", "bf16", "fp32"), counts_with=DECODE)
    quantize: str = option(MACHINE, VIDEO, text, "WHAT",
        "none (default), fp8 or int8 (the experts' inner blocks in 8 bits), or auto: that which the GPU multiplies",
        choices=("none", "fp8", "int8", "auto"))
    quality: str = option(MACHINE, START, text, "NAME",
        "exact (default); high: --vae_dtype bf16; fast: also --quantize auto and, for base weights, --cache 0.05",
        choices=tuple(QUALITIES), displaces=("vae_dtype", "quantize", "cache"), counts_with=DECODE)
    attention: str = option(MACHINE, VIDEO, text, "NAME",
        "auto, sdpa, flash, cudnn, flash2, flash3, or sage: in 8 bits, which changes the numbers and is never auto",
        choices=("auto", "sdpa", "flash", "cudnn", "flash2", "flash3", "sage"))
    vae_dtype: str = option(MACHINE, VIDEO, text, "DTYPE",
        "fp32 (default) or bf16 for the decode: less time and memory, 47 to 61 dB from fp32",
        choices=("fp32", "bf16"), counts_with=DECODE)
    offload_model: bool | None = option(MACHINE, HOW, truth, "[BOOL]",
        "keep on the GPU what fits, read the rest when needed; default True, under torchrun False", counts_with=DECODE)
    vram: float | None = option(MACHINE, HOW, real, "GB",
        "use at most this much of the GPU's memory; default: what is free", limits=(0.001, 10_000),
        counts_with=DECODE, example="12")
    t5_cpu: bool = option(MACHINE, HOW, truth, "", "run the text encoder on the CPU")
    convert_model_dtype: bool = option(MACHINE, VIDEO, truth, "",
        "cast every parameter, also those kept in float32 otherwise")
    vae_tiling: bool = option(MACHINE, HOW, truth, "", "decode in tiles: less memory", counts_with=DECODE)
    t5_fsdp: bool = option(MACHINE, START, truth, "", "shard the text encoder over the processes (torchrun)")
    dit_fsdp: bool = option(MACHINE, START, truth, "", "shard the experts over the processes (torchrun)")
    ulysses_size: int = option(MACHINE, START, whole, "N",
        "processes that share one video's attention heads (torchrun)", default=1, limits=(1, 1024), counts_with=DECODE)
    ring_size: int = option(MACHINE, START, whole, "N", "processes that share one video's tokens in a ring (torchrun)",
        default=1, limits=(1, 1024), counts_with=DECODE)

    use_prompt_extend: bool = option(EXTENSION, VIDEO, truth, "",
        "first have a language model lengthen the prompts", into="prompt", counts_with=EXTEND)
    prompt_extend_method: str = option(EXTENSION, VIDEO, text, "METHOD", "local_qwen (default), dashscope or openai",
        choices=METHODS, into="prompt", needs=EXTENDS, counts_with=EXTEND)
    prompt_extend_model: str | None = option(EXTENSION, VIDEO, text, "MODEL", "default: by method and task",
        into="prompt", needs=EXTENDS, counts_with=EXTEND)
    prompt_extend_target_lang: str = option(EXTENSION, VIDEO, text, "LANG", "zh (default) or en", choices=LANGUAGES,
        into="prompt", needs=EXTENDS, counts_with=EXTEND)
    prompt_extend_options: str | None = option(EXTENSION, VIDEO, text, "JSON",
        'further fields of a service\'s requests, such as {"enable_thinking": false}',
        into="prompt", needs=EXTENDS, counts_with=EXTEND)
    prompt_extend_on_error: str = option(EXTENSION, START, text, "WHAT",
        "raw (default): keep the prompt, with a warning; or fail", choices=ON_ERROR, needs=EXTENDS, counts_with=EXTEND)
    no_extend_cache: bool = option(EXTENSION, START, truth, "", "ask again for prompts that were extended before",
        needs=EXTENDS, counts_with=EXTEND)
    extend_only: str | None = option(EXTENSION, START, path, "FILE",
        "write the extended prompts to a .txt or .jsonl file and stop", counts_with=EXTEND)

    shard: str | None = option(OUTPUT, START, text, "I/N",
        "make every N-th video of the prompt file, from the I-th on; slurm: this task's place in its Slurm array",
        counts_with=MODES)
    save_dir: str = option(OUTPUT, START, path, "DIR", "default outputs", default="outputs", beaten_by="save_file",
        example="fox")
    save_file: str | None = option(OUTPUT, START, path, "FILE",
        "name of the .mp4 (one video only); inside --save_dir if that is given and FILE names no folder",
        counts_with=DECODE, example="fox.mp4")
    save_latents: bool = option(OUTPUT, HOW, truth, "", "keep the final latents beside the video")
    decode_latents: str | None = option(OUTPUT, START, path, "FILE", "only decode latents that were kept",
        counts_with=DECODE)
    preview: bool = option(OUTPUT, HOW, truth, "", "a contact sheet PNG beside the video", counts_with=DECODE,
        example="")
    gallery: bool = option(OUTPUT, START, truth, "", "after the run, a page index.html over the videos of --save_dir")
    grid: bool = option(OUTPUT, START, truth, "",
        "as --gallery, with a table of the videos by the first two --sweep, and a montage of it", needs=("sweep",))
    preview_steps: bool = option(OUTPUT, HOW, truth, "",
        "after each step a frame of the predicted video, in a PNG strip (.steps.png) beside it")
    overwrite: bool = option(OUTPUT, START, truth, "", "replace files that exist", counts_with=MODES, example="")
    record: str = option(OUTPUT, HOW, text, "WHAT",
        "in the video file: full (default), portable (names and hashes, no path of this machine) or none; the .json "
        "beside it is always full", choices=("full", "portable", "none"), counts_with=DECODE)
    resume: bool = option(OUTPUT, START, truth, "", "skip videos that are finished", example="")
    ignore_disk: bool = option(OUTPUT, START, truth, "", "start although the disk cannot hold all videos")
    on_error: str = option(OUTPUT, START, text, "WHAT", "continue (default) with the other videos, or stop",
        choices=("continue", "stop"))
    replay: str | None = option(OUTPUT, START, path, "FILE",
        "take every setting from the record (.json or .mp4) of a video; other flags override", counts_with=DECODE,
        example="fox.mp4")
    dry_run: bool = option(OUTPUT, START, truth, "", "check everything, print the plan, make nothing",
        counts_with=MODES, example="")
    json: bool = option(OUTPUT, START, truth, "", "plan and progress as JSON lines on stdout", counts_with=MODES)
    debug: bool = option(OUTPUT, START, truth, "", "tracebacks with errors", counts_with=MODES)
    # fmt: on

    @property
    def guide(self) -> tuple[float, float, float]:
        """Scale (1: off), tau and alpha of `--nag`."""
        given = list(map(float, self.nag.split(",")))
        scale, tau, alpha = [*given, *NAG[len(given) :]][:3]
        return scale, tau, alpha

    @property
    def windows(self) -> tuple[int, int] | None:
        """Frames of a `--window`, and those that two neighbours share at least; None without windows."""
        if self.window is None:
            return None
        frames, *shared = map(int, self.window.split(","))
        frames = max(frames, 5)
        return frames, min(shared[0] if shared else (frames // 4 + 1) // 4 * 4, frames - 5)

    def recorded(self) -> dict[str, Any]:
        """The values that differ from the defaults, as JSON takes them; paths of files that exist here are absolute."""
        values = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) != DEFAULTS[name]}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {name: absolute(v) if OPTIONS[name].read in (path, paths) else v for name, v in values.items()}


OPTIONS: dict[str, Option] = {row.name: row.metadata["option"] for row in dataclasses.fields(Request)}
# Options that --sweep varies, and that columns of a prompt file may give.
VARIED = [
    name for name, row in OPTIONS.items()
    if row.scope is VIDEO and row.group is not EXTENSION and name not in ("task", "prompt_file", "image_path_file")
]  # fmt: skip
DEFAULTS: dict[str, Any] = {row.name: row.default for row in dataclasses.fields(Request)}


def read(name: str, value: object, problems: list[str]) -> Any:
    """The value of option `name`; None, and a problem, if it cannot be read."""
    row = OPTIONS[name]
    try:
        found = row.read(value)
        if row.read in (numbers, wholes) and found.count(",") > row.takes.count(","):
            raise ValueError
        return found
    except (TypeError, ValueError, OverflowError):
        shown = f"{value!r}"[:80]
        problems.append(f"--{name} takes {row.read.__doc__}, not {shown}")
        return None


def read_all(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Values by option from words, JSON or Python; left out are None (not given) and what cannot be read."""
    given = {name: value for name, value in values.items() if value is not None}
    reads = {name: read(name, value, problems) for name, value in given.items() if name in OPTIONS}
    problems.extend(f"{name!r} is not an option of this program" for name in given if name not in OPTIONS)
    return {name: value for name, value in reads.items() if value is not None}


def absolute(value: Any) -> Any:
    """A text that names something here as an absolute path, in lists and after `high=` too; anything else as it is."""
    if isinstance(value, list):
        return [absolute(part) for part in value]
    if not isinstance(value, str):
        return value
    expert, _, rest = value.rpartition("=")
    for named, before in ((value, ""), (rest, f"{expert}=")):
        for end in {len(named), named.rfind(":")} - {-1}:
            path = os.path.expanduser(named[:end])
            if end and os.path.exists(path):
                return f"{before}{Path(path).absolute()}{named[end:]}"
    return value


def without_effect(values: Mapping[str, Any], request: Request) -> list[str]:
    """Warnings about flags in `values` that this start, whose request is `request`, ignores."""
    active = {name for name in OPTIONS if getattr(request, name) != DEFAULTS[name]}
    warnings = []
    for name in values:
        row = OPTIONS[name]
        mode = next((mode for mode in MODES if mode in active and mode not in row.counts_with), row.beaten_by)
        if name in active and mode in active:
            warnings.append(f"--{name} has no effect beside --{mode}")
        elif name in active and row.needs and not active.intersection(row.needs):
            warnings.append(f"--{name} has no effect without {' or '.join(f'--{other}' for other in row.needs)}")
    return warnings
