"""The videos to make: prompts with their images, seeds, sizes and output files. Faults go to a `Check`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from wan.cli.checks import Check
from wan.cli.options import LARGEST_SEED, OPTIONS, VARIED, WEIGHTS, WITH_IMAGE, WITH_LAST_IMAGE, WITH_VIDEO, Request
from wan.configs import SIZE_CONFIGS, TaskConfig
from wan.jobs.job import Generate, Job, Weights, chains, windows_of
from wan.jobs.output_paths import row_file
from wan.jobs.prompt_files import Row, expanded, read_paths, read_rows, slug
from wan.media.images import open_image, video_size
from wan.media.video import describe_clip, is_video
from wan.utils.argument_parser import not_one_of, short
from wan.utils.progress import quantity

Picture = tuple[tuple[int, int], str]  # its size; that and how it was changed, for the plan
SLURM = {"ID": "", "COUNT": "", "MIN": "0", "STEP": "1"}  # the variables of an array's task, with usual values


def prompt_rows(request: Request, config: TaskConfig, extended: bool, check: Check) -> list[Row]:
    """The prompts, each with its images; the task's example if neither prompt nor image was given."""
    pictured = request.image is not None or request.image_path_file is not None
    if request.prompt_file is not None:
        rows = read_rows(expanded(request.prompt_file), check.problems, check.warnings)
    elif request.prompt is not None or request.video is not None or (pictured and config.image_fit):
        rows = [Row((request.prompt or "").strip(), "--prompt")]
    else:
        rows = [Row(config.example_prompt, "the example prompt")]
        check.warn(f"no --prompt given: the example is used, {config.example_prompt!r}")
    rows = _with_images(request, config, rows, check)
    for name, tasks in (("last_image", WITH_LAST_IMAGE), ("video", WITH_VIDEO)):
        if (given := getattr(request, name)) is not None:
            file: dict[str, Any] = {name: expanded(given)}
            rows = [row if getattr(row, name) else replace(row, **file) for row in rows]
        if config.name not in tasks and (first := next((row for row in rows if getattr(row, name)), None)):
            where, what = f"{_origin(request, first, name)}{getattr(first, name)}", name.replace("_", " ")
            check.problem(f"{where}: {config.name} takes no {what}; --task {tasks}")
    if request.window is not None:
        frames, *shared = map(int, request.window.split(","))
        check.frames("--window", int(check.number("--window", frames, 5, 5, 4093)))
        check.number("--window: OVERLAP", shared[0] if shared else 0, 0, 0, max(0, frames - 5))
        if request.use_prompt_extend or config.name not in WITH_VIDEO or any(row.image for row in rows):
            check.problem(f"--window is of {WITH_VIDEO}; leave it out with images and --use_prompt_extend")
    made_from = next((row for row in rows if row.video), None)
    if made_from and (request.chain or any(row.video and row.image for row in rows)):
        check.problem(f"{_origin(request, made_from, 'video')}{made_from.video}: leave it out with an image or --chain")
    for row in rows:
        if not row.prompt and not (extended and row.image):
            check.problem(f"{row.source}: the prompt is empty; only --use_prompt_extend with an image can do without")
    return rows


def _with_images(request: Request, config: TaskConfig, rows: list[Row], check: Check) -> list[Row]:
    flag = next((f"--{name}" for name in ("image", "image_path_file") if getattr(request, name) is not None), None)
    named = next((row.source for row in rows if row.image), None)
    if config.image_fit is None:
        if flag or named:
            check.problem(f"{flag or named}: {config.name} takes no image; --task {WITH_IMAGE} take one")
        return [replace(row, image=None) for row in rows]
    if request.image_path_file is not None:
        images = read_paths(expanded(request.image_path_file), check.problems)
        if named:
            check.problem(f"{named} and --image_path_file both name an image; give one of them")
        if rows and images and len(rows) != len(images):
            counts = f"{quantity(len(rows), 'prompt')} but {quantity(len(images), 'image')}"
            check.problem(f"--image_path_file: {counts} in {request.image_path_file}, which are paired one to one")
        pairs = zip(rows, images, strict=False)
        return [replace(row, image=image, source=f"{row.source}, {source}") for row, (source, image) in pairs]
    # a later row of a chain without an image starts from the last frame of the row before it
    bare = {n for n, row in enumerate(rows) if row.image is None and not (request.chain and n)}
    if request.image is not None:
        own = expanded(request.image)
    elif not bare or config.example_image is None:
        return rows
    elif request.prompt is None and request.prompt_file is None:
        own = Path(config.example_image)
        check.warn(f"no --image given: the example picture {own} is used")
    else:
        ways = "--image for all, --image_path_file, or an 'image' in each row of a .jsonl or .csv file"
        check.problem(f"{rows[min(bare)].source}: {config.name} needs an image; give one {ways}")
        return rows
    return [replace(row, image=own) if n in bare else row for n, row in enumerate(rows)]


def swept_name(text: str) -> str:
    """The option of a `--sweep NAME=V,V`."""
    return text.partition("=")[0].strip().lstrip("-")


def combinations(sweeps: Sequence[str], check: Check) -> list[dict[str, str]]:
    """Values by option, one for each combination of `--sweep NAME=V,V`; `[{}]` without sweeps."""
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        name, (_, equals, listed) = swept_name(text), text.partition("=")
        values = [value.strip() for value in listed.split(";" if ";" in listed else ",")]
        if not equals or not all(values):
            check.problem(f"--sweep {text}: write NAME=VALUE,VALUE, such as lora_strength=0.5,1")
        elif name not in VARIED:
            check.problem(f"--sweep {text}: {not_one_of('', name, VARIED)}")
        elif name in axes or len(set(values)) < len(values):
            check.problem(f"--sweep {text}: an option or a value is given twice")
        else:
            axes[name] = values
    # a change of weights reads them again
    slowest_first = sorted(axes, key=lambda name: OPTIONS[name].group != WEIGHTS)
    return [dict(zip(slowest_first, values, strict=True)) for values in product(*(axes[n] for n in slowest_first))]


def label_of(values: Mapping[str, str]) -> str:
    """The part of a file name that says the values: "_lora_strength0.5"."""
    shown = {name: re.sub(r"[^\w.,-]+", "-", Path(value).name)[:40] for name, value in values.items()}
    return "".join(f"_{name}{value}" for name, value in shown.items() if name != "base_seed")  # which all names show


def make_jobs(generate: Generate, rows: Mapping[int, Row], label: str, check: Check) -> list[Job]:
    """One job for each prompt and seed. rows: by the index of their first video. label: --sweep in file names."""
    request, config, count = generate.request, generate.config, generate.request.num_videos
    step, names = config.size_step, config.sizes_by_name()
    default_size = check.size("--size", request.size or config.sizes[0], step, names)
    default_frames = _frame_num(request, config, check)
    default_negative = config.sample_neg_prompt if request.negative_prompt is None else request.negative_prompt
    own_file = expanded(request.save_file) if request.save_file is not None and not request.chain else None
    folder = expanded(request.save_dir)
    opened: dict[Path, Picture | None] = {}  # each picture once, however many prompts name it
    for name in () if rows or config.image_fit is None else ("image", "last_image"):
        if path := getattr(request, name):  # without rows, all missing files are still reported at once
            _open(f"--{name} ", expanded(path), opened, check)
    jobs: list[Job] = []
    for index, row in rows.items():
        area = default_size if row.size is None else check.size(f"{row.source}: size", row.size, step, names)
        where = "--frame_num" if row.frame_num is None else f"{row.source}: frame_num"
        frames = default_frames if row.frame_num is None else check.frames(where, row.frame_num)
        _warn_of_extent(area, min(frames, (request.windows or (frames,))[0]), config, generate.weights, check)
        size, picture = area, ""
        if row.image and (first := _open(origin := _origin(request, row, "image"), row.image, opened, check)):
            size = _fitted(f"{origin}{row.image}", first[0], area, is_video(row.image), config, check)
            picture = first[1] if first[0] == size == area else f"{first[1]}, the area of {area[0]}x{area[1]}"
        if row.last_image:
            last = _open(_origin(request, row, "last_image"), row.last_image, opened, check)
            picture += f", to {last[1]}" if last else ""
            check.several(f"{where}: a first and a last frame need", frames)
        if row.video and not config.mask_channels:
            flag = {str(row.video): _origin(request, row, "video").strip()}
            picture = check.attempt(partial(describe_clip, row.video, frames, config.sample_fps), flag) or ""
        file = own_file
        if row.save_file is not None:
            named = row_file(folder, row.save_file, row.source, check)
            file = file or named.with_stem(named.stem + label)
        parts = row.prompt.split("|") if request.window else [row.prompt]
        if len(parts) > max(1, len(windows_of(frames, request.windows))):
            check.problem(f"{row.source}: {len(parts)} parts of the prompt, and fewer --window in {frames} frames")
        original = row.original_prompt or row.prompt
        slugged = f"{label}_{slug(original)}{'_replay' if request.replay is not None else ''}.mp4"
        first_seed, where = request.base_seed, "--base_seed"
        if row.seed is not None and row.seed >= 0:
            first_seed, where = row.seed, f"{row.source}: seed"
        if first_seed + count - 1 > LARGEST_SEED:
            most = LARGEST_SEED - count + 1
            check.problem(f"{where} {first_seed} is too large for --num_videos {count}, at most {most}")
        for number in range(count):
            seed = first_seed + number
            name = f"{config.name}_{index + number:04d}_seed{seed}{slugged}"
            job = Job(
                index=index + number, prompt=row.prompt, original_prompt=original,
                negative_prompt=default_negative if row.negative_prompt is None else row.negative_prompt,
                image=row.image, area=area, size=size, frame_num=frames, seed=seed, save_file=file or folder / name,
                source=row.source, picture=picture, last_image=row.last_image, video=row.video,
                named=file is not None,
            )  # fmt: skip
            jobs.append(job)
    release, pictured = generate.weights.release, next((job for job in jobs if job.image), None)
    if pictured and release and release.text_only:
        check.warn(f"{pictured.source}: an image, but {release.name} was trained without images")
    return jobs


def _frame_num(request: Request, config: TaskConfig, check: Check) -> int:
    if request.seconds is None or request.frame_num is not None:
        return config.frame_num if request.frame_num is None else check.frames("--frame_num", request.frame_num)
    seconds = check.number("--seconds", request.seconds, 1.0, 1 / config.sample_fps, 600)
    frames = math.floor((seconds * config.sample_fps - 1) / 4 + 0.5) * 4 + 1
    return check.frames(f"--seconds {short(seconds)}: frame_num", frames)


def _origin(request: Request, row: Row, picture: str) -> str:
    """The flag or the row that a picture comes from, before its path."""
    path = getattr(request, picture)
    return f"--{picture} " if path is not None and getattr(row, picture) == expanded(path) else f"{row.source}: "


def _warn_of_extent(size: tuple[int, int], frames: int, config: TaskConfig, weights: Weights, check: Check) -> None:
    name, trained = config.name, [SIZE_CONFIGS[text] for text in config.sizes]
    if weights.release and weights.release.kind != "recipe":
        name, trained = weights.release.name, list(weights.release.sizes)
    if size not in trained:
        listed = ", ".join(f"{width}*{height}" for width, height in trained)
        check.warn(f"size {size[0]}*{size[1]} is none of those that {name!r} was trained for ({listed})")
    if frames > config.frame_num:
        check.warn(f"{frames} frames are more than the {config.frame_num} that {config.name} was trained for")


def _open(origin: str, path: Path, opened: dict[Path, Picture | None], check: Check) -> Picture | None:
    """The picture; None if it cannot be opened, which is a problem where it is first named."""
    if path not in opened:
        image = check.attempt(partial(open_image, path), begin=origin)
        text = ", ".join([f"{image.width}x{image.height}", *image.info["changes"]]) if image else ""
        opened[path] = (image.size, text) if image else None
    return opened[path]


def _fitted(
    origin: str, size: tuple[int, int], area: tuple[int, int], clip: bool, config: TaskConfig, check: Check
) -> tuple[int, int]:
    """The video's size for a picture of `size`, or the last frame of a clip, where `area` was asked for."""
    # A clip of the size asked for keeps it; the rule for pictures would make 832x464 of 832x480.
    if clip and math.prod(size) == math.prod(area) and not any(side % config.size_step for side in size):
        return size
    fitted = check.attempt(partial(video_size, config, size, area), begin=f"{origin}: ")
    return check.size(f"{origin}: size", f"{fitted[0]}*{fitted[1]}", config.size_step) if fitted else area


def check_chain(request: Request, config: TaskConfig, check: Check) -> None:
    """Check the options that `--chain` excludes or needs."""
    extends = request.use_prompt_extend or request.extend_only is not None
    faults = {
        f"--chain: {config.name} takes no image to continue from; {WITH_IMAGE} take one": config.image_fit is None,
        "--chain lets the rows of a --prompt_file continue each other; give one":
            request.prompt_file is None or request.decode_latents is not None,
        "--chain and --image_path_file exclude each other; give --image for the first row":
            request.image_path_file is not None,
        "--chain: extend the prompts first, with --extend_only FILE.txt and without --chain": extends,
    }  # fmt: skip
    check.problems += [fault for fault, holds in faults.items() if holds and request.chain]


def linked(request: Request, jobs: Sequence[Job], rows: Sequence[Row], check: Check) -> list[Job]:
    """`jobs` with the links of chains set. jobs: for each of `rows` one per seed, one after the other."""
    if not request.chain or not jobs:
        return list(jobs)
    copies, made = request.num_videos, list(jobs)
    firsts: dict[int, Job] = {}  # first clip of the chain by index of the later ones
    for index in range(copies, len(made)):
        row, before, job = rows[index // copies], made[index - copies], made[index]
        if row.image is not None:
            continue
        first = firsts[index] = firsts.setdefault(index - copies, before)
        if row.size is not None and job.area != first.area:
            check.problem(f"{row.source}: a chain has the size of its first clip; leave 'size' out")
        for each, frames in ((rows[index // copies - 1], before.frame_num), (row, job.frame_num)):
            check.several(f"{each.source}: a clip of a chain needs", frames)
        made[index] = replace(
            job, image=before.save_file, follows=True, area=first.size, size=first.size,
            picture=f"the last frame of job {before.number}{job.picture}",
        )  # fmt: skip
    if not firsts:
        check.problem(f"--chain: no row of {request.prompt_file} continues another; those with an image start anew")
    joined = {first.save_file: first.save_file.with_stem(f"{first.save_file.stem}_chain") for first in firsts.values()}
    if request.save_file is not None:
        if len(joined) > 1:
            check.problem(f"--save_file names one video, but {len(joined)} chains are joined; use --save_dir")
        joined = dict.fromkeys(joined, expanded(request.save_file))
    return [replace(job, joined=joined[firsts[job.index].save_file]) if job.index in firsts else job for job in made]


def chosen_shard(request: Request, check: Check) -> Request:
    """`request` with `--shard` as I/N, for "slurm" from this task's place in its array; None for all videos."""
    text = request.shard
    if text is None:
        return request
    if alone := [f"--{name}" for name in ("decode_latents", "extend_only") if getattr(request, name) is not None]:
        check.problem(f"--shard divides the videos of a prompt file; leave it out with {alone[0]}")
    fault = f"takes I/N with I from 1 to N, such as 2/4, or slurm, not {text!r}"
    if text == "slurm":
        fault = "slurm: not a task of a Slurm array whose ids follow each other evenly; give --shard I/N"
        ids = [os.environ.get(f"SLURM_ARRAY_TASK_{name}") or usual for name, usual in SLURM.items()]
        with suppress(ValueError, ZeroDivisionError):  # reported below
            task, count, first, step = map(int, ids)
            text = f"{(task - first) // step + 1}/{count}" if (task - first) % step == 0 else text
    found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return replace(request, shard=text if int(found[2]) > 1 else None)
    check.problem(f"--shard {fault}")
    return replace(request, shard=None)


def own_jobs(request: Request, jobs: Sequence[Job], rows: Sequence[Row], check: Check) -> list[Job]:
    """The jobs that this process makes. With `--shard`: every N-th video or chain; numbers, seeds and names stay."""
    if request.shard is None:
        return list(jobs)
    index, count = map(int, request.shard.split("/"))
    if request.base_seed < 0 and any(row.seed is None or row.seed < 0 for row in rows):
        check.problem("--shard: each process would draw a seed of its own; give the same --base_seed to all of them")
    own = [job for chain in chains(jobs)[index - 1 :: count] for job in chain]
    if jobs and not own:
        check.warn(f"--shard {index}/{count}: there are only {len(jobs)} videos, none of them falls to this process")
    return sorted(own, key=lambda job: job.index)
