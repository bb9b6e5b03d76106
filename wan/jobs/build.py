"""The videos to make: prompts with their images, seeds, sizes and output files, each checked.

Faults go to a `Check`; nothing is raised and nothing is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from wan.cli.checks import Check
from wan.cli.options import LARGEST_SEED, WITH_IMAGE, WITH_LAST_IMAGE, WITH_VIDEO, Request
from wan.configs import SIZE_CONFIGS, TaskConfig
from wan.jobs.job import Job, Weights, chains
from wan.jobs.output_paths import RowFiles
from wan.jobs.prompt_files import Row, expanded, read_paths, read_rows, slug
from wan.media.ffmpeg import CONTAINERS, is_video
from wan.media.images import list_changes, open_image, video_size
from wan.media.video import describe_clip
from wan.utils.argument_parser import short
from wan.utils.errors import InputError
from wan.utils.progress import quantity

SUFFIX = next(iter(CONTAINERS))  # of a video that gets its name here
SLURM = "SLURM_ARRAY_TASK_"
WHOLE = (1, 1)


def prompt_rows(request: Request, config: TaskConfig, extended: bool, check: Check) -> list[Row]:
    """The prompts, each with its images; the task's example if neither prompt nor image was given."""
    pictured = request.image is not None or request.image_path_file is not None
    if request.prompt_file is not None:
        if request.prompt is not None:
            check.problem("--prompt and --prompt_file exclude each other; give one of them")
        rows = read_rows(expanded(request.prompt_file), check.problems, check.warnings)
    elif request.prompt is not None or request.video is not None or (pictured and config.image_fit):
        rows = [Row((request.prompt or "").strip(), "--prompt")]
    else:
        rows = [Row(config.example_prompt, "the example prompt")]
        check.warn(f"no --prompt given: the example is used, {config.example_prompt!r}")
    rows = _with_other_files(request, config, _with_images(request, config, rows, check), check)
    for row in rows:
        if not row.prompt and not (extended and row.image):
            check.problem(f"{row.source}: the prompt is empty; only --use_prompt_extend with an image can do without")
    return rows


def _with_images(request: Request, config: TaskConfig, rows: list[Row], check: Check) -> list[Row]:
    flag = next((name for name in ("image", "image_path_file") if getattr(request, name) is not None), None)
    if config.image_fit is None:
        if where := f"--{flag}" if flag else next((row.source for row in rows if row.image), None):
            check.problem(f"{where}: {config.name} takes no image; --task {WITH_IMAGE} take one")
        return [replace(row, image=None) for row in rows]
    if request.image_path_file is not None:
        return _paired(request, rows, check)
    if request.image is not None:
        own = expanded(request.image)
        return [row if row.image or _follows(request, n) else replace(row, image=own) for n, row in enumerate(rows)]
    bare = next((row for n, row in enumerate(rows) if row.image is None and not _follows(request, n)), None)
    if bare and config.example_image:
        if request.prompt is None and request.prompt_file is None:
            check.warn(f"no --image given: the example picture {config.example_image} is used")
            return [replace(row, image=Path(config.example_image)) for row in rows]
        every = "the first row of a chain" if request.chain else "every prompt"
        check.problem(
            f"{bare.source}: {config.name} needs an image for {every}: give one --image for all, --image_path_file, "
            "or an 'image' in each row of a .jsonl or .csv file"
        )
    return rows


def _paired(request: Request, rows: list[Row], check: Check) -> list[Row]:
    """The rows with the images of --image_path_file, one to one."""
    images = read_paths(expanded(request.image_path_file or ""), check.problems)
    if request.image is not None:
        check.problem("--image and --image_path_file exclude each other; give one of them")
    if named := next((row for row in rows if row.image), None):
        check.problem(f"{named.source} names an image, and so does --image_path_file; give one of them")
    if rows and images and len(rows) != len(images):
        counts = f"{quantity(len(rows), 'prompt')} but {quantity(len(images), 'image')}"
        check.problem(f"--image_path_file: {counts} in {request.image_path_file}, which are paired one to one")
    return [
        replace(row, image=image, source=f"{row.source}, {source}")
        for row, (source, image) in zip(rows, images, strict=False)
    ]


def _follows(request: Request, number: int) -> bool:
    """Whether a row without an image starts from the last frame of the row before it."""
    return request.chain and number > 0


def _with_other_files(request: Request, config: TaskConfig, rows: list[Row], check: Check) -> list[Row]:
    """The rows with their last images, and with the videos that they are made from."""
    for name, tasks in (("last_image", WITH_LAST_IMAGE), ("video", WITH_VIDEO)):
        if (given := getattr(request, name)) is not None:
            own: dict[str, Any] = {name: expanded(given)}
            rows = [row if getattr(row, name) else replace(row, **own) for row in rows]
        first = next((row for row in rows if getattr(row, name)), None)
        if first and config.name not in tasks:
            file = f"{_origin(request, first, name)}{getattr(first, name)}"
            check.problem(f"{file}: {config.name} takes no {name.replace('_', ' ')}; {tasks} can")
    made_from = next((row for row in rows if row.video), None)
    if made_from is None and request.strength is not None:
        check.problem("--strength is about a video to start from; give --video, or 'video' in a row of --prompt_file")
    if made_from and (request.chain or any(row.video and row.image for row in rows)):
        check.problem(f"{_origin(request, made_from, 'video')}{made_from.video}: leave it out with an image or --chain")
    return rows


def make_jobs(request: Request, config: TaskConfig, weights: Weights, rows: Sequence[Row], check: Check) -> list[Job]:
    """One job for each prompt and seed."""
    step, names = config.size_step, config.sizes_by_name()
    default_size = check.size("--size", request.size or config.sizes[0], step, names)
    default_frames = _frame_num(request, config, check)
    single = len(rows) * request.num_videos == 1
    if request.save_file is not None and not single and not request.chain:
        count = len(rows) * request.num_videos
        check.problem(f"--save_file names one video, but there are {count} to make; use --save_dir")
    folder = expanded(request.save_dir)
    row_file = RowFiles(folder, check)
    pictures = _Pictures(config, check)
    for name in () if rows or config.image_fit is None else ("image", "last_image"):
        if path := getattr(request, name):  # without rows, all missing files are still reported at once
            pictures.open(f"--{name} ", expanded(path))
    jobs: list[Job] = []
    for row in rows:
        area, frames = default_size, default_frames
        if row.size is not None:
            area = check.size(f"{row.source}: size", row.size, step, names)
        if row.frame_num is not None:
            frames = check.frames(f"{row.source}: frame_num", row.frame_num)
        _warn_of_extent(area, frames, config, weights, check)
        size, picture = pictures.fit(_origin(request, row, "image"), row.image, area) if row.image else (area, "")
        if row.last_image:
            last = pictures.open(_origin(request, row, "last_image"), row.last_image)
            picture += f", to {last.text}" if last else ""
            where = f"{row.source}: frame_num" if row.frame_num is not None else "--frame_num"
            check.several(f"{where}: a first and a last frame need", frames)
        if row.video and not config.mask_channels:
            origin = {str(row.video): _origin(request, row, "video").strip()}
            picture = check.attempt(partial(describe_clip, row.video, frames, config.sample_fps), origin) or ""
        original = row.original_prompt or row.prompt
        negatives = (row.negative_prompt, request.negative_prompt, config.sample_neg_prompt)
        job = Job(
            index=len(jobs),
            prompt=row.prompt,
            original_prompt=original,
            negative_prompt=next(text for text in negatives if text is not None),
            image=row.image,
            area=area,
            size=size,
            frame_num=frames,
            seed=_first_seed(request, row, check),
            save_file=row_file(row.save_file, row.source) if row.save_file is not None else Path(),
            source=row.source,
            picture=picture,
            last_image=row.last_image,
            video=row.video,
            named=row.save_file is not None,
        )
        if request.save_file is not None and single and not request.chain:
            job = replace(job, save_file=expanded(request.save_file), named=True)
        slugged = f"{slug(original)}{'_replay' if request.replay is not None else ''}{SUFFIX}"
        for n in range(request.num_videos):
            each = replace(job, index=len(jobs), seed=job.seed + n)
            name = f"{config.name}_{each.number}_seed{each.seed}_{slugged}"
            jobs.append(each if job.save_file.name else replace(each, save_file=folder / name))
    return jobs


def _first_seed(request: Request, row: Row, check: Check) -> int:
    """Seed of the row's first video; the others have those after it."""
    first, where, count = request.base_seed, "--base_seed", request.num_videos
    if row.seed is not None and row.seed >= 0:
        first, where = row.seed, f"{row.source}: seed"
    if first + count - 1 > LARGEST_SEED:
        several = f" for --num_videos {count}" if count > 1 else ""
        check.problem(f"{where} {first} is too large{several}, at most {LARGEST_SEED - count + 1}")
    return first


def _frame_num(request: Request, config: TaskConfig, check: Check) -> int:
    if request.seconds is None:
        return config.frame_num if request.frame_num is None else check.frames("--frame_num", request.frame_num)
    if request.frame_num is not None:
        check.problem("--seconds and --frame_num exclude each other; give one of them")
        return config.frame_num
    seconds = check.number("--seconds", request.seconds, 1.0, 1 / config.sample_fps, 600)
    frames = math.floor((seconds * config.sample_fps - 1) / 4 + 0.5) * 4 + 1
    return check.frames(f"--seconds {short(seconds)}: frame_num", frames)


def _origin(request: Request, row: Row, picture: str) -> str:
    """The flag or the row that a picture comes from: how a sentence about it begins, before its path."""
    path = getattr(request, picture)
    return f"--{picture} " if path is not None and getattr(row, picture) == expanded(path) else f"{row.source}: "


def _warn_of_extent(size: tuple[int, int], frames: int, config: TaskConfig, weights: Weights, check: Check) -> None:
    """Warns of sizes and lengths that the weights in use were not trained for."""
    trained = [SIZE_CONFIGS[text] for text in config.sizes]
    name = config.name
    if weights.release and weights.release.kind != "recipe":
        trained, name = list(weights.release.sizes), weights.release.name
    if size not in trained:
        listed = ", ".join(f"{width}*{height}" for width, height in trained)
        check.warn(f"size {size[0]}*{size[1]} is none of those that {name!r} was trained for ({listed})")
    if frames > config.frame_num:
        check.warn(
            f"{frames} frames are more than the {config.frame_num} {config.name} was trained for; motion may repeat"
        )


class _Picture(NamedTuple):
    size: tuple[int, int]
    text: str  # its size and how it was changed, for the plan


class _Pictures:
    """Opens each picture once, however many prompts name it."""

    def __init__(self, config: TaskConfig, check: Check) -> None:
        self.config, self.check = config, check
        self.opened: dict[Path, _Picture | None] = {}

    def fit(self, origin: str, path: Path, area: tuple[int, int]) -> tuple[tuple[int, int], str]:
        """The video's size for this picture and `--size`, and where it comes from."""
        picture = self.open(origin, path)
        if picture is None:
            return area, ""
        size, step = picture.size, self.config.size_step
        # A clip of the size asked for keeps it; the rule for pictures would make 832x464 of 832x480.
        if not (is_video(path) and math.prod(size) == math.prod(area) and not any(n % step for n in size)):
            try:
                width, height = video_size(self.config, size, area)
            except InputError as e:
                self.check.problem(f"{origin}{path}: {e}")
                return area, ""
            size = self.check.size(f"{origin}{path}: size", f"{width}*{height}", step)
        kept = picture.size == size == area
        return size, f"{picture.text}{'' if kept else f', the area of {area[0]}x{area[1]}'}"

    def open(self, origin: str, path: Path) -> _Picture | None:
        """The picture; None if it cannot be opened, which is a problem where it is first named."""
        if path not in self.opened:
            try:
                image = open_image(path)
                text = ", ".join([f"{image.width}x{image.height}", *list_changes(image)])
                self.opened[path] = _Picture(image.size, text)
            except InputError as e:
                self.opened[path] = None
                self.check.problem(f"{origin}{e}")
        return self.opened[path]


def check_chain(request: Request, config: TaskConfig, check: Check) -> None:
    """Check the options that `--chain` excludes or needs."""
    if not request.chain:
        return
    if config.image_fit is None:
        check.problem(f"--chain: {config.name} takes no image to continue from; {WITH_IMAGE} take one")
    if request.decode_latents is not None:
        check.problem("--chain is of prompts; leave it out with --decode_latents")
    elif request.prompt_file is None:
        check.problem("--chain lets the rows of a --prompt_file continue each other; give one")
    if request.image_path_file is not None:
        check.problem("--chain and --image_path_file exclude each other; give --image for the first row")
    if request.use_prompt_extend or request.extend_only is not None:
        check.problem("--chain: extend the prompts first, with --extend_only FILE.txt and without --chain")


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
    files = {first.save_file for first in firsts.values()}
    joined = {file: file.with_name(f"{file.stem}_chain{file.suffix}") for file in files}
    if request.save_file is not None:
        joined = dict.fromkeys(files, expanded(request.save_file))
        if len(files) > 1:
            check.problem(f"--save_file names one video, but {len(files)} chains are joined; use --save_dir")
    return [replace(job, joined=joined[firsts[job.index].save_file]) if job.index in firsts else job for job in made]


def chosen_shard(request: Request, check: Check) -> Request:
    """`request` with `--shard` as I/N, for "slurm" from this task's place in its array; None for all videos."""
    if request.shard is not None:
        alone = [f"--{name}" for name in ("decode_latents", "extend_only") if getattr(request, name) is not None]
        if alone:
            check.problem(f"--shard divides the videos of a prompt file; leave it out with {alone[0]}")
    if request.shard == "slurm":
        request = replace(request, shard=_slurm_shard(check))
    if request.shard is not None and _read_shard(request.shard, check) == WHOLE:
        request = replace(request, shard=None)
    return request


def own_jobs(request: Request, jobs: Sequence[Job], rows: Sequence[Row], check: Check) -> list[Job]:
    """The jobs that this process makes."""
    index, count = _read_shard(request.shard, check) if request.shard is not None else WHOLE
    if count > 1 and request.base_seed < 0 and any(row.seed is None or row.seed < 0 for row in rows):
        check.problem("--shard: each process would draw a seed of its own; give the same --base_seed to all of them")
    own = [job for number, chain in enumerate(chains(jobs)) if number % count == index - 1 for job in chain]
    own.sort(key=lambda job: job.index)
    if jobs and not own:
        check.warn(f"--shard {index}/{count}: there are only {len(jobs)} videos, none of them falls to this process")
    return own


def _read_shard(text: str, check: Check) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    check.problem(f"--shard takes I/N with I from 1 to N, such as 2/4, or slurm, not {text!r}")
    return WHOLE


def _slurm_shard(check: Check) -> str | None:
    """I/N of this task in its Slurm array, whose ids may start anywhere."""
    task, count, first, step = (os.environ.get(SLURM + name, "") for name in ("ID", "COUNT", "MIN", "STEP"))
    if not (task and count):
        check.problem(f"--shard slurm: not a task of a Slurm array ({SLURM}ID and {SLURM}COUNT are not set)")
        return None
    try:
        place, rest = divmod(int(task) - int(first or 0), int(step or 1))
        if not rest and 0 <= place < int(count):
            return f"{place + 1}/{int(count)}"
    except (ValueError, ZeroDivisionError):
        pass
    check.problem("--shard slurm: the array's ids do not follow each other evenly; give --shard I/N")
    return None
