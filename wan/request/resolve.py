"""From the flags as given to a run that can start: defaults by task and weights, prompts and images read, all checked.

Everything here needs no weight and no torch. All problems are collected into one `InputError`.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.configs import WAN_CONFIGS, download_command
from wan.extend.extension import ExtendSettings
from wan.request.checks import Check
from wan.request.jobs import LARGEST_SEED, SAVE_DIR, check_outputs, make_jobs, prompt_rows
from wan.request.prompts import Row
from wan.request.settings import Job, Request, Run, Settings
from wan.request.weights import Weights, choose_sampling, choose_weights
from wan.utils.errors import InputError

ATTENTION = ("auto", "sdpa", "flash", "cudnn", "flash2", "flash3")
NOT_THE_VIDEO = ("base_seed", "resume", "overwrite", "on_error", "save_latents", "preview", "dry_run", "json", "debug")
DRAWN_SEEDS = 2**31  # short enough to read, and what prompt services take


def resolve(request: Request, problems: Sequence[str] = ()) -> Run:
    """Every default filled, every check made that needs no weight.

    Raises InputError with all problems at once; `problems` are those that were found before.
    """
    check = Check()
    check.problems.extend(problems)
    if request.replay is not None:
        request = replayed(request, check)
    task = check.choice("--task", request.task, tuple(WAN_CONFIGS))
    if task != (request.task or task):
        check.stop()  # all other defaults and limits hang on the task
    config = WAN_CONFIGS[task]
    drawn = request.base_seed is None or request.base_seed < 0
    seed = request.base_seed if not drawn else _earlier_seed(request) or secrets.randbelow(DRAWN_SEEDS)
    request = replace(request, base_seed=check.whole("--base_seed", seed, 0, 0, LARGEST_SEED))
    weights = choose_weights(request, task, tuple(config.experts), check)
    settings = _settings(request, task, config, weights, check)
    extend = _extension(request, task, check)
    rows: list[Row] = []
    jobs: list[Job] = []
    decode: tuple[Path, Path] | None = None
    extend_only = Path(request.extend_only).expanduser() if request.extend_only is not None else None
    if request.decode_latents is not None:
        decode = _decode(request, check)
    else:
        rows = prompt_rows(request, task, config, extend is not None, check)
        jobs = make_jobs(request, task, config, weights, rows, check)
        if extend_only is None:
            check_outputs(request, [job.save_file for job in jobs], check)
        else:
            _check_extend_only(extend_only, request, check)
    check.stop()
    return Run(
        settings, tuple(jobs), tuple(check.warnings), request.as_dict(), tuple(rows), extend, extend_only, decode
    )


def _earlier_seed(request: Request) -> int | None:
    """The seed that the run which `--resume` goes on with had drawn, from the newest record of the same command."""
    from wan.utils.video import read_record

    if not request.resume:
        return None

    def essence(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if name not in NOT_THE_VIDEO}

    folder = Path(request.save_dir or SAVE_DIR).expanduser()
    for file in sorted(folder.glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            recorded = read_record(file)["request"]
            if essence(recorded) == essence(request.as_dict()):
                return int(recorded["base_seed"])
        except (InputError, KeyError, TypeError, AttributeError, ValueError):
            continue  # another program's file
    return None


def replayed(request: Request, check: Check) -> Request:
    """The request that a record holds, narrowed to the record's one video, with the flags of `request` on top.

    The record's prompt is the extended one; it is not extended again. The processes it was made with do not count.
    """
    from wan.utils.video import read_record

    path = Path(request.replay or "").expanduser()
    record = read_record(path)
    try:
        job = record["job"]
        earlier = dict(record["request"])
        width, height = job["size"]
        earlier |= {
            "size": f"{width}*{height}",
            "base_seed": job["seed"],
            **{name: job[name] for name in ("frame_num", "prompt", "negative_prompt", "image")},
        }
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"--replay {path}: not the record of a video") from e
    earlier = {name: value for name, value in earlier.items() if name not in NOT_REPLAYED}
    given = request.as_dict()
    for name, others in INSTEAD_OF.items():
        if name in given:
            earlier = {key: value for key, value in earlier.items() if key not in others}
    problems: list[str] = []
    request = Request.from_dict({**earlier, **given}, problems)
    check.problems.extend(f"--replay {path}: {problem}" for problem in problems)
    return request


# What belongs to one start of the program or to one machine, or is settled by the record's job.
NOT_REPLAYED = {"replay", "dry_run", "json", "debug", "overwrite", "resume", "decode_latents", "extend_only"}
NOT_REPLAYED |= {"t5_fsdp", "dit_fsdp", "ulysses_size", "ring_size"}
NOT_REPLAYED |= {"prompt_file", "image_path_file", "num_videos", "seconds", "use_prompt_extend", "no_extend_cache"}
NOT_REPLAYED |= {"prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang", "prompt_extend_on_error"}
# A flag given beside --replay also takes the place of these.
INSTEAD_OF = {
    "prompt_file": ("prompt", "image", "negative_prompt"),
    "image_path_file": ("image",),
    "seconds": ("frame_num",),
    "timesteps": ("sample_steps", "sample_shift", "sample_solver"),
    "sample_steps": ("timesteps",),
    "sample_shift": ("timesteps",),
    "sample_solver": ("timesteps",),
    "lora_dir": ("lora_strength", "preset"),
    "save_dir": ("save_file",),
}


def _settings(request: Request, task: str, config: EasyDict, weights: Weights, check: Check) -> Settings:
    sampling = choose_sampling(request, config, weights, check)
    if sampling.lora_steps and request.lora_mode == "merge":
        check.problem("--lora_mode merge: this preset changes the LoRA from step to step, which takes adapter")
    modes = ("adapter", "merge") if sampling.lora_steps else ("merge", "adapter")
    alpha = request.lora_alpha
    if alpha is not None:
        alpha = check.number("--lora_alpha", alpha, 1, 1e-3, 1e4)
    processes = _check_processes(request, check)
    return Settings(
        task=task,
        ckpt_dir=_checkpoint_folder(request, task, check),
        loras=weights.loras,
        lora_mode=check.choice("--lora_mode", request.lora_mode, modes),
        lora_allow_partial=bool(request.lora_allow_partial),
        lora_alpha=alpha,
        expert_files=weights.expert_files,
        preset=weights.release.name if weights.release else None,
        **vars(sampling),
        device=check.choice("--device", request.device, ("auto", "cuda", "cpu", "mps"), other=r"cuda:\d+"),
        dtype=check.choice("--dtype", request.dtype, ("auto", "bf16", "fp32")),
        attention=check.choice("--attention", request.attention, ATTENTION),
        noise_device=check.choice("--noise_device", request.noise_device, ("auto", "cpu")),
        offload_model=processes == 1 if request.offload_model is None else request.offload_model,
        t5_cpu=bool(request.t5_cpu),
        convert_model_dtype=bool(request.convert_model_dtype),
        vae_tiling=bool(request.vae_tiling),
        t5_fsdp=bool(request.t5_fsdp),
        dit_fsdp=bool(request.dit_fsdp),
        ulysses_size=request.ulysses_size or 1,
        ring_size=request.ring_size or 1,
        save_latents=bool(request.save_latents),
        preview=bool(request.preview),
        overwrite=bool(request.overwrite),
        resume=bool(request.resume),
        on_error=check.choice("--on_error", request.on_error, ("continue", "stop")),
    )


def _checkpoint_folder(request: Request, task: str, check: Check) -> Path:
    """A folder, or a hub id whose files are fetched later."""
    config = WAN_CONFIGS[task]
    get = f"get it with: {download_command(config)}"
    given = request.ckpt_dir
    if given is None:
        if request.extend_only is None:
            check.problem(f"--ckpt_dir is missing: it names the folder of the {task} checkpoint; {get}")
        return Path(config.hub_id)
    path = Path(given).expanduser()
    if path.is_dir() or is_hub_id(given):
        return path
    check.problem(f"--ckpt_dir {given}: {'not a folder' if path.exists() else 'no such folder'}; {get}")
    return path


def is_hub_id(name: str) -> bool:
    """`owner/name`, unless there is something here that it may mean as a path."""
    owner, _, rest = name.partition("/")
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and bool(rest) and not Path(owner).exists()


def _check_processes(request: Request, check: Check) -> int:
    """How many processes torchrun started (1 without it), and whether the flags fit that number."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    ulysses = check.whole("--ulysses_size", request.ulysses_size, 1, 1, 1024)
    ring = check.whole("--ring_size", request.ring_size, 1, 1, 1024)
    asked = [f"--{name}" for name in ("t5_fsdp", "dit_fsdp") if getattr(request, name)]
    asked += [f"--{name} {n}" for name, n in (("ulysses_size", ulysses), ("ring_size", ring)) if n > 1]
    if asked and processes == 1:
        count = ulysses * ring if ulysses * ring > 1 else 8
        command = f"torchrun --nproc-per-node {count} generate.py ..."
        check.problem(f"{' '.join(asked)} needs several processes; start it with: {command}")
    elif processes % (ulysses * ring):
        legal = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        check.problem(
            f"--ulysses_size {ulysses} (x --ring_size {ring}) must divide the {processes} processes; legal are {legal}"
        )
    return processes


def _extension(request: Request, task: str, check: Check) -> ExtendSettings | None:
    """How prompts are to be extended; None if they are used as they are."""
    method = check.choice("--prompt_extend_method", request.prompt_extend_method, ("local_qwen", "dashscope", "openai"))
    language = check.choice("--prompt_extend_target_lang", request.prompt_extend_target_lang, ("zh", "en"))
    on_error = check.choice("--prompt_extend_on_error", request.prompt_extend_on_error, ("raw", "fail"))
    if not (request.use_prompt_extend or request.extend_only):
        return None
    return ExtendSettings(
        task=task,
        method=method,
        model=request.prompt_extend_model,
        language=language,
        seed=request.base_seed or 0,
        on_error=on_error,
        use_cache=not request.no_extend_cache,
        device=request.device or "auto",
    )


def _decode(request: Request, check: Check) -> tuple[Path, Path]:
    """(latents, video) of --decode_latents; the video lies beside its latents unless --save_file says otherwise."""
    latents = Path(request.decode_latents or "").expanduser()
    if not latents.is_file():
        check.problem(f"--decode_latents {latents}: no such file")
    stem = latents.name.removesuffix(".safetensors").removesuffix(".latents")
    video = Path(request.save_file).expanduser() if request.save_file else latents.with_name(f"{stem}.mp4")
    check_outputs(request, [video], check)
    return latents, video


def _check_extend_only(file: Path, request: Request, check: Check) -> None:
    if file.suffix.lower() not in (".txt", ".jsonl"):
        check.problem(f"--extend_only {file}: write to a .txt (prompts) or .jsonl (prompts, images, originals) file")
    if file.exists() and not request.overwrite:
        check.problem(f"--extend_only {file}: exists already; --overwrite replaces it")
