"""The videos to make: prompts with their images, seeds, sizes and output files, each checked.

Everything wrong is noted in a `Check`; nothing is raised and nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wan.cli.checks import Check
from wan.cli.options import LARGEST_SEED, Request
from wan.configs import SIZE_CONFIGS, TASKS, TaskConfig
from wan.jobs.job import Job, Weights
from wan.jobs.output_paths import row_file
from wan.jobs.prompt_files import Row, expanded, output_name, read_paths, read_rows
from wan.media.ffmpeg import is_video
from wan.media.images import list_changes, open_image, video_size
from wan.utils.argument_parser import short
from wan.utils.errors import InputError
from wan.utils.progress import quantity


def prompt_rows(request: Request, config: TaskConfig, extended: bool, check: Check) -> list[Row]:
    """The prompts, each with its image; the task's example where nothing was given."""
    if request.prompt_file is not None:
        if request.prompt is not None:
            check.problem("--prompt and --prompt_file exclude each other; give one of them")
        problems: list[str] = []
        rows, blank = read_rows(expanded(request.prompt_file), problems)
        check.problems.extend(f"--prompt_file {problem}" for problem in problems)
        if blank:
            check.warn(f"{request.prompt_file}: {blank} blank line{'s' if blank > 1 else ''} skipped")
    elif request.prompt is not None:
        rows = [Row(request.prompt.strip(), "--prompt")]
    else:
        pictured = request.image is not None or request.image_path_file is not None
        imagined = extended and pictured and config.image_fit is not None
        rows = [Row("" if imagined else config.example_prompt, "the example prompt")]
        if not imagined:
            check.warn(f"no --prompt given: the example is used, {config.example_prompt!r}")
    rows = _with_last_images(request, config, _with_images(request, config, rows, check), check)
    for row in rows:
        if not row.prompt and not (extended and row.image):
            check.problem(f"{row.source}: the prompt is empty; only --use_prompt_extend with an image can do without")
    return rows


def _with_images(request: Request, config: TaskConfig, rows: list[Row], check: Check) -> list[Row]:
    if request.image_path_file is not None:
        problems: list[str] = []
        images = read_paths(expanded(request.image_path_file), problems)
        check.problems.extend(f"--image_path_file {problem}" for problem in problems)
        if request.image is not None:
            check.problem("--image and --image_path_file exclude each other; give one of them")
        if named := next((row for row in rows if row.image), None):
            check.problem(f"{named.source} names an image, and so does --image_path_file; give one of them")
        if rows and images and len(rows) != len(images):
            counts = f"{quantity(len(rows), 'prompt')} but {quantity(len(images), 'image')}"
            check.problem(f"--image_path_file: {counts} in {request.image_path_file}, which are paired one to one")
        rows = [
            replace(row, image=image, source=f"{row.source}, {source}")
            for row, (source, image) in zip(rows, images, strict=False)
        ]
    elif request.image is not None:
        own = expanded(request.image)
        rows = [row if row.image or _follows(request, n) else replace(row, image=own) for n, row in enumerate(rows)]
    if config.image_fit is None:
        if any(row.image for row in rows):
            able = " and ".join(name for name, other in TASKS.items() if other.image_fit)
            check.warn(f"{config.name} takes no image; the one given is ignored ({able} take one)")
        return [replace(row, image=None) for row in rows]
    bare = [row for number, row in enumerate(rows) if row.image is None and not _follows(request, number)]
    if bare and config.example_image and request.image_path_file is None:
        if request.chain:
            check.problem(f"{bare[0].source}: the first row of a chain needs an image with {config.name}; give --image")
            return rows
        if request.prompt_file is not None:
            check.problem(
                f"{config.name} needs an image for every prompt, {bare[0].source} has none: give one --image for all, "
                "--image_path_file, or an 'image' in each row of a .jsonl or .csv file"
            )
            return rows
        check.warn(f"no --image given: the example picture {config.example_image} is used")
        rows = [replace(row, image=Path(config.example_image)) for row in rows]
    return rows


def _follows(request: Request, number: int) -> bool:
    """Whether a row without an image has one from the row before it."""
    return request.chain and number > 0


def _with_last_images(request: Request, config: TaskConfig, rows: list[Row], check: Check) -> list[Row]:
    if request.last_image is not None:
        rows = [row if row.last_image else replace(row, last_image=expanded(request.last_image)) for row in rows]
    first = next((row for row in rows if row.last_image), None)
    if first and not config.mask_channels:
        able = " and ".join(name for name, other in TASKS.items() if other.mask_channels)
        beginning = f"{_named_by(request, first, 'last_image')}{first.last_image}"
        check.problem(f"{beginning}: {config.name} takes no last image; {able} does")
    return rows


def make_jobs(request: Request, config: TaskConfig, weights: Weights, rows: Sequence[Row], check: Check) -> list[Job]:
    """One job for each prompt and seed."""
    step = config.size_step
    default_size = check.size("--size", request.size or config.sizes[0], step, config.sizes_by_name())
    default_frames = _frame_num(request, config, check)
    count = request.num_videos
    if request.save_file is not None and len(rows) * count > 1 and not request.chain:
        check.problem(f"--save_file names one video, but there are {len(rows) * count} to make; use --save_dir")
    save_dir = expanded(request.save_dir)
    pictures = _Pictures(config, check)
    for name in () if rows or config.image_fit is None else ("image", "last_image"):
        if given := getattr(request, name):  # all that is not there is told at once
            pictures.told_of(f"--{name} ", expanded(given))
    jobs: list[Job] = []
    for row in rows:
        size, frames = default_size, default_frames
        if row.size is not None:
            size = check.size(f"{row.source}: size", row.size, step, config.sizes_by_name())
        if row.frame_num is not None:
            frames = check.frames(f"{row.source}: frame_num", row.frame_num)
        _warn_of_extent(size, frames, config, weights, check)
        area = size
        if row.image:
            size, picture = pictures.fit(_named_by(request, row, "image"), row.image, area)
        else:
            picture = ""
        if row.last_image:
            picture += pictures.told_of(_named_by(request, row, "last_image"), row.last_image)
            where = f"{row.source}: frame_num" if row.frame_num is not None else "--frame_num"
            check.several(f"{where}: a first and a last frame need", frames)
        first = _first_seed(request, row, check)
        named = row_file(save_dir, row.save_file, row.source, check) if row.save_file is not None else None
        if request.save_file is not None and len(rows) * count == 1 and not request.chain:
            named = expanded(request.save_file)
        for seed in range(first, first + count):
            original = row.original_prompt or row.prompt
            negatives = (row.negative_prompt, request.negative_prompt, config.sample_neg_prompt)
            negative = next(text for text in negatives if text is not None)
            name = output_name(config.name, len(jobs), seed, original, replayed=request.replay is not None)
            jobs.append(
                Job(
                    index=len(jobs),
                    prompt=row.prompt,
                    original_prompt=original,
                    negative_prompt=negative,
                    image=row.image,
                    area=area,
                    size=size,
                    frame_num=frames,
                    seed=seed,
                    save_file=named or save_dir / name,
                    named=named is not None,
                    source=row.source,
                    picture=picture,
                    last_image=row.last_image,
                )
            )
    return jobs


def _first_seed(request: Request, row: Row, check: Check) -> int:
    """Of the row's videos, which have this seed and those after it."""
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


def _named_by(request: Request, row: Row, picture: str) -> str:
    """How a sentence about a row's picture begins, before its path: with the flag that brought it, or with the row."""
    given = getattr(request, picture)
    brought = given is not None and getattr(row, picture) == expanded(given)
    return f"--{picture} " if brought else f"{row.source}: "


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


class _Pictures:
    """Opens each picture once, however many prompts name it."""

    def __init__(self, config: TaskConfig, check: Check) -> None:
        self.config, self.collected = config, check
        self.sizes: dict[Path, tuple[int, int] | None] = {}
        self.told: dict[Path, str] = {}

    def fit(self, beginning: str, path: Path, area: tuple[int, int]) -> tuple[tuple[int, int], str]:
        """The video's size for this picture and `--size`, and how it came about. beginning: of sentences about it."""
        found = self._open(beginning, path)
        try:
            if found:
                if self._goes_on(path, found, area):
                    size = found
                else:
                    width, height = video_size(self.config, found, area)
                    size = self.collected.size(f"{beginning}{path}: size", f"{width}*{height}", self.config.size_step)
                kept = found == size == area
                return size, f"{self.told[path]}{'' if kept else f', the area of {area[0]}x{area[1]}'}"
        except InputError as e:
            self.collected.problem(f"{beginning}{path}: {e}")
        return area, ""

    def _goes_on(self, path: Path, found: tuple[int, int], area: tuple[int, int]) -> bool:
        """Whether it is of a video of the size asked for; the rule for pictures would make 832x464 of 832x480."""
        step = self.config.size_step
        return is_video(path) and math.prod(found) == math.prod(area) and not any(n % step for n in found)

    def told_of(self, beginning: str, path: Path) -> str:
        """How the plan goes on for a last picture."""
        return f", to {self.told[path]}" if self._open(beginning, path) else ""

    def _open(self, beginning: str, path: Path) -> tuple[int, int] | None:
        """The picture's size; None if it cannot be opened, which is a problem where it is first named."""
        if path not in self.sizes:
            self.sizes[path] = None
            try:
                image = open_image(path)
                self.sizes[path] = image.size
                done = "".join(f", {what}" for what in list_changes(image))
                self.told[path] = f"{image.width}x{image.height}{done}"
            except InputError as e:
                self.collected.problem(f"{beginning}{e}")
        return self.sizes[path]
