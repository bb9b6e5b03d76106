"""From the flags as given to an outcome that can start, without weights or torch; all problems in one `InputError`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wan.checkpoints.hub import place
from wan.checkpoints.layout import check_complete
from wan.checkpoints.safetensors_file import read_header
from wan.cli.checks import Check
from wan.cli.options import DEFAULTS, OPTIONS, SCHEMA, START, VIDEO, Request, paths, read_all, without_effect
from wan.cli.parser import COMMAND, OTHER_TASK, program
from wan.configs import TASKS, TaskConfig, download_command
from wan.jobs import build
from wan.jobs.job import Decode, Extend, Generate, Outcome, Replayed, Weights
from wan.jobs.output_paths import check_outputs, folder_problem, name_problem
from wan.jobs.prompt_files import Row, expanded, text_problem
from wan.jobs.weights import PARTS, choose_sampling, choose_weights, part_files, takes_cache, with_quality
from wan.media.video import read_record
from wan.prompt_extension.extend import ExtendSettings
from wan.utils.errors import InputError
from wan.utils.files import parse_json

# Options that a record holds for its one video.
OF_A_JOB = ("prompt", "negative_prompt", "image", "last_image", "video", "size", "frame_num", "base_seed")
# Decided by the machine and the weights once these are open: a run that differs in them can still be continued.
LEFT_TO_THE_PLAN = ("base_seed", "device", "dtype", "attention", "quantize")
DRAWN_SEEDS = 2**31  # short enough to read, and what prompt services take


def resolve(values: Mapping[str, Any], problems: Sequence[str] = ()) -> Outcome:
    """Fill every default and make every check that needs no weight. InputError with all problems.
    values: by option, only those that were given. problems: those found before."""
    check = Check(problems)
    if {"save_dir", "save_file"} <= values.keys() and not os.path.dirname(values["save_file"]):
        inside = os.path.join(values["save_dir"], values["save_file"])
        values = {name: value for name, value in values.items() if name != "save_dir"} | {"save_file": inside}
    asked, record = replayed(values, expanded(values["replay"])) if "replay" in values else (Request(**values), None)
    request = _checked(asked, check)
    if request.task != asked.task:
        check.stop()  # all other defaults and limits hang on the task
    config = TASKS[request.task]
    request = with_quality(build.chosen_shard(request, check), values)
    if request.base_seed < 0 and request.shard is None:  # processes that share a file must not draw each its own
        earlier = earlier_seed(request) if request.resume else None
        request = replace(request, base_seed=secrets.randbelow(DRAWN_SEEDS) if earlier is None else earlier)
    processes = request.ulysses_size * request.ring_size
    shared = [f"--{name}" for name in ("t5_fsdp", "dit_fsdp") if getattr(request, name)]
    shared += [f"--{name} {n}" for name in ("ulysses_size", "ring_size") if (n := getattr(request, name)) > 1]
    if shared and os.environ.get("WORLD_SIZE", "1") == "1":
        script = "-m generate" if program() == COMMAND else program().removeprefix("python ")
        command = f"torchrun --nproc-per-node {processes if processes > 1 else 8} {script} ..."
        check.problem(f"{' '.join(shared)} needs several processes; start it with: {command}")
    build.check_chain(request, config, check)
    if request.decode_latents is not None:
        outcome: Outcome = _decode(request, config, check)
    elif request.extend_only is not None:
        outcome = _extend_only(request, config, check)
    else:
        outcome = replace(_generate(request, config, values, check), replayed=record)
    if isinstance(outcome, Generate | Decode) and (folder := outcome.weights.ckpt_dir):
        with suppress(OSError):  # reported when its files are opened
            if folder.is_dir():
                check.attempt(partial(check_complete, folder, config, outcome.weights.not_of_folder(config)))
    check.stop()
    return replace(outcome, warnings=tuple(dict.fromkeys([*check.warnings, *without_effect(values, request)])))


def _checked(request: Request, check: Check) -> Request:
    changed: dict[str, Any] = {}
    for name, row in OPTIONS.items():
        flag, value = f"--{name}", getattr(request, name)
        texts = [text for text in (value if isinstance(value, tuple) else [value]) if isinstance(text, str)]
        faults = [f"{flag} {fault}" for text in texts if (fault := text_problem(text))]
        if name == "task" and not faults and value.lower().startswith(("s2v", "animate", "vace")):
            faults = [f"{flag} {value}: {OTHER_TASK}; the tasks are {', '.join(TASKS)}"]
        if faults:
            check.problems += faults
            changed[name] = DEFAULTS[name]
        elif row.choices:
            changed[name] = check.choice(flag, value, row.choices, row.pattern)
        elif row.limits and value is not None and check.number(flag, value, float("nan"), *row.limits) != value:
            changed[name] = DEFAULTS[name]
    request = replace(request, **changed)
    for one, other in (("prompt", "prompt_file"), ("image", "image_path_file"), ("seconds", "frame_num")):
        if getattr(request, one) is not None and getattr(request, other) is not None:
            check.problem(f"--{one} and --{other} exclude each other; give one of them")
    return request


def _generate(request: Request, config: TaskConfig, given: Collection[str], check: Check) -> Generate:
    """The videos of every combination of --sweep, and of rows with options of their own."""
    extend = _extension(request, check) if request.use_prompt_extend else None
    if request.sweep and request.chain:
        check.problem("--sweep varies single videos; leave --chain out")
    variants: list[Generate] = []
    rows: list[Row] = []
    for values in build.combinations(request.sweep or (), check):
        swept = _with_options(request, values, check, "--sweep: ") if values else request
        own_rows = dict(enumerate(build.prompt_rows(swept, config, extend is not None, check), len(rows)))
        rows += own_rows.values()
        for options in dict.fromkeys(row.options for row in own_rows.values()) or [()]:  # no rows have faults too
            some = {n * request.num_videos: row for n, row in own_rows.items() if row.options == options}
            source = next((f"{row.source}: " for row in some.values()), "")
            asked = _with_options(swept, dict(options), check, source) if options else swept
            made = _variant(asked, config, some, build.label_of(values), check)
            cached = takes_cache(made.sampling, made.weights.distilled) and asked.window is None
            asked = with_quality(asked, {*given, *values, *dict(options)}, cached=cached)
            numbered = tuple(replace(job, variant=len(variants)) for job in made.jobs)
            variants.append(replace(made, request=asked, jobs=numbered))
    jobs = sorted((job for variant in variants for job in variant.jobs), key=lambda job: job.index)
    jobs = build.linked(request, jobs, rows, check)
    own = build.own_jobs(request, jobs, rows, check)
    read = [path for job in jobs for path in (None if job.follows else job.image, job.last_image, job.video) if path]
    read += [expanded(name) for name in (request.prompt_file, request.image_path_file, request.replay) if name]
    # each job's file, then those that chains are joined into
    files = [job.save_file for job in jobs] + list(dict.fromkeys(job.joined for job in jobs if job.joined))
    own_files = {file for job in own for file in (job.save_file, job.joined) if file}
    if request.save_file is not None and not request.chain and len(jobs) > 1:
        check.problem(f"--save_file names one video, but there are {len(jobs)} to make; use --save_dir")
    else:
        check_outputs(request, files, check, read, own=own_files)
    if len(variants) == 1 and not request.sweep:
        return replace(variants[0], jobs=tuple(own), extend=extend)
    by_number = {
        number: replace(variants[number], jobs=tuple(job for job in own if job.variant == number), extend=extend)
        for number in sorted({job.variant for job in own})
    }
    return replace(variants[0], request=request, jobs=tuple(own), extend=extend, variants=by_number)


def _variant(request: Request, config: TaskConfig, rows: Mapping[int, Row], label: str, check: Check) -> Generate:
    weights = choose_weights(request, config, _checkpoint_folder(request, config, check), check)
    sampling = choose_sampling(request, config, weights, check)
    if sampling.lora_steps and request.lora_mode == "merge":
        check.problem("--lora_mode merge: this preset changes the LoRA from step to step, which takes adapter")
    modes = ("adapter", "merge") if sampling.lora_steps else ("merge", "adapter")
    weights = replace(weights, lora_mode=check.choice("--lora_mode", request.lora_mode, modes))
    variant = Generate(request, config, weights, sampling, jobs=())
    jobs = build.make_jobs(variant, rows, label, check)
    made_from = any(job.video for job in jobs)
    bare = [f"{row.source}: strength" for row in rows.values() if "strength" in dict(row.options) and not row.video]
    if bare or (rows and request.strength is not None and not made_from):
        named = bare[0] if bare else "--strength"
        check.problem(f"{named} is about a video to start from; give --video, or 'video' in that row of --prompt_file")
    if made_from and sampling.first_step == sampling.steps:
        check.problem(f"--strength {sampling.strength:g} leaves none of {sampling.steps} steps; 1 / steps leaves one")
    return replace(variant, jobs=tuple(jobs))


def _with_options(request: Request, values: Mapping[str, object], check: Check, source: str) -> Request:
    """`request` with other values of options, checked; problems begin with their source."""
    own = Check()
    listed = {name: [value] if OPTIONS[name].read is paths else value for name, value in values.items()}
    changed = _checked(replace(request, sweep=None, **read_all(listed, own.problems)), own)
    check.problems += [f"{source}{problem}" for problem in own.problems]
    check.warnings += own.warnings
    return changed


def _extend_only(request: Request, config: TaskConfig, check: Check) -> Extend:
    file, problem = expanded(request.extend_only or ""), None
    if file.suffix.lower() not in (".txt", ".jsonl"):
        problem = f"{file}: write to a .txt (prompts) or .jsonl (prompts, images, originals) file"
    elif unusable := name_problem(file):
        problem = f"{str(file)!r}: the name {unusable}"
    elif os.path.lexists(file) and (file.is_dir() or not request.overwrite):
        problem = f"{file} already exists; --overwrite replaces a file"
    if problem := problem or folder_problem(file.absolute().parent):
        check.problem(f"--extend_only {problem}")
    rows = build.prompt_rows(request, config, True, check)
    return Extend(request, tuple(rows), _extension(request, check), file)


def _decode(request: Request, config: TaskConfig, check: Check) -> Decode:
    """The video goes beside its latents unless --save_file names another place."""
    latents = expanded(request.decode_latents or "")
    if not latents.is_file():
        check.problem(f"--decode_latents {request.decode_latents or '(empty)'}: no such file")
    stem = latents.name.removesuffix(".safetensors").removesuffix(".latents")
    video = expanded(request.save_file) if request.save_file else latents.parent / f"{stem}.mp4"
    check_outputs(request, [video], check, [latents])
    folder, files = _checkpoint_folder(request, config, check), part_files(request, config, check)
    weights = Weights(folder, files=files, vae_only=True)
    return Decode(request, config, weights, latents, video)


def _checkpoint_folder(request: Request, config: TaskConfig, check: Check) -> Path | None:
    """A folder, or a hub id whose files are fetched later; None where single files replace all of it."""
    get, given = f"get it with: {download_command(config.hub_id)}", request.ckpt_dir
    if given is None:
        flags = {name: f"--expert {name}=FILE" for name in config.experts} | {part: f"--{part}" for part in PARTS}
        own = {text.partition("=")[0] for text in request.expert or ()}
        own |= {part for part in PARTS if getattr(request, part) is not None}
        flags = flags if request.decode_latents is None else {"vae": "--vae"}
        lacking = [flag for part, flag in flags.items() if part not in own]
        if not lacking:
            return None
        get = get if len(lacking) == len(flags) else f"give it, or give {', '.join(lacking)} too"
        check.problem(f"--ckpt_dir is missing: it names the folder of the {config.name} checkpoint; {get}")
        return Path(config.hub_id)
    path = expanded(given)
    try:
        if not (path.is_dir() or place(given)):
            check.problem(f"--ckpt_dir {given}: {'not a folder' if path.exists() else 'no such folder'}; {get}")
    except OSError as e:
        check.problem(f"--ckpt_dir {given}: cannot be reached ({e.strerror})")
    return path


def _extension(request: Request, check: Check) -> ExtendSettings:
    options = None
    if request.prompt_extend_options is not None:
        with suppress(ValueError):  # no JSON leaves None, which is refused below
            options = parse_json(request.prompt_extend_options)
        if not isinstance(options, dict):
            check.problem(f"--prompt_extend_options takes a JSON object, not {request.prompt_extend_options!r:.80}")
    return ExtendSettings(
        task=request.task, method=request.prompt_extend_method, model=request.prompt_extend_model,
        language=request.prompt_extend_target_lang, seed=request.base_seed, on_error=request.prompt_extend_on_error,
        use_cache=not request.no_extend_cache, device=request.device, options=options,
    )  # fmt: skip


def replayed(given: Mapping[str, Any], path: Path) -> tuple[Request, Replayed]:
    """The request of a record, narrowed to its one video, with the flags of `given` on top. InputError.
    The record's prompt is the extended one; it is not extended again."""
    try:
        record = read_record(path)
    except InputError as e:
        raise InputError(f"--replay {e}") from e
    if (schema := record.get("schema", SCHEMA)) != SCHEMA:
        raise InputError(f"--replay {path}: written by another version of this program (schema {schema}, not {SCHEMA})")
    if "clips" in record:
        raise InputError(f"--replay {path}: is joined of several clips; replay one of those")
    try:
        job = record["job"]
        width, height = job["area"]
        earlier = {
            name: value for name, value in record["request"].items()
            if not (row := OPTIONS.get(name)) or (row.scope is not START and row.into not in OF_A_JOB)
        }  # fmt: skip
        earlier |= {name: job[name] for name in ("frame_num", "prompt", "negative_prompt", "image")}
        earlier |= {"size": f"{width}*{height}", "base_seed": job["seed"]}
        earlier |= {name: job.get(name) for name in ("last_image", "video")}  # older records have none
        earlier["strength"] = earlier.get("strength") if job.get("video") else None
        if not all(isinstance(record.get(name, {}), dict) for name in ("meaning", "versions")):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"--replay {path}: not the record of a video") from e
    problems, displaced = list[str](), {other for name in given for other in OPTIONS[name].displaces}
    earlier = {name: value for name, value in earlier.items() if name not in displaced}
    request = Request(**read_all({**earlier, **given}, problems))
    if problems:
        raise InputError([f"--replay {path}: {problem}" for problem in problems])
    others = {name for name in OPTIONS if name in given or name in displaced or OPTIONS[name].into in given}
    return request, Replayed(path, record, frozenset(others | {OPTIONS[name].into for name in given}))


def earlier_seed(request: Request) -> int | None:
    """The seed that the run to be resumed had drawn: of the newest record, also in latents, that asks for the same."""
    named = [name for name, row in OPTIONS.items() if row.scope is VIDEO and name not in LEFT_TO_THE_PLAN]
    swept = set(map(build.swept_name, request.sweep or ()))

    def asked_for(recorded: Mapping[str, Any]) -> dict[str, Any]:
        return {name: recorded.get(name, DEFAULTS[name]) for name in named if name not in swept}

    folder, wanted = expanded(request.save_dir), asked_for(request.recorded())
    written: dict[Path, float] = {}
    for file in (*folder.glob("*.json"), *folder.glob("*.latents.safetensors")):
        with suppress(OSError):  # another process has just removed it, or a link that leads nowhere
            written[file] = file.stat().st_mtime
    for file in sorted(written, key=lambda file: written[file], reverse=True):
        with suppress(InputError, OSError, KeyError, TypeError, AttributeError, ValueError):  # another program's file
            kept = file.suffix == ".safetensors"
            recorded = (json.loads(read_header(file)[1]["record"]) if kept else read_record(file))["request"]
            if asked_for(recorded) == wanted:
                return int(recorded["base_seed"])
    return None
