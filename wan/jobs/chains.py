"""Chains: rows of a prompt file of which each clip starts from the last frame of the one before it.

A row with an image starts a chain, and so does the first row. With several seeds each seed has its own chain. One
process makes all clips of a chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from wan.cli.checks import Check
from wan.cli.options import WITH_IMAGE, Request
from wan.configs import TaskConfig
from wan.jobs.job import Job
from wan.jobs.prompt_files import Row, expanded


def chains(jobs: Iterable[Job]) -> list[list[Job]]:
    """Units of work in order: the clips of a chain, or one video that is in none."""
    found: dict[Path, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.joined or job.save_file, []).append(job)
    return list(found.values())


def frames_joined(chain: Sequence[Job]) -> int:
    """Frames of the video that a chain is joined into: two neighbours share one."""
    return sum(job.frame_num for job in chain) - (len(chain) - 1)


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
