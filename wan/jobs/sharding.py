"""`--shard`: every N-th video, or chain, of a prompt file. Numbers, seeds and names are those of the whole file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from wan.cli.checks import Check
from wan.cli.options import Request
from wan.jobs.chains import chains
from wan.jobs.job import Job
from wan.jobs.prompt_files import Row

SLURM = "SLURM_ARRAY_TASK_"
WHOLE = (1, 1)


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
