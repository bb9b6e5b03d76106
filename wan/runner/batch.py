"""From a plan to videos on disk: texts first, then one job after the other. A failed job does not end the run."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

from wan.cli.parser import program, words_of
from wan.distributed.launch import Runtime
from wan.distributed.mesh import origin_of
from wan.jobs.job import Job, chains
from wan.media.images import save_contact_sheet
from wan.pipeline import Pipeline
from wan.planning.build import check_ranks
from wan.planning.plan import Plan
from wan.planning.time_estimate import work_of
from wan.runner.record import State, copy_video, find_video, find_videos, read_latents, repair
from wan.runner.video_job import Event, clips_of, decode_and_save, hold_lock, join, join_chains, make_video, reason
from wan.utils.accelerator import Accelerator
from wan.utils.errors import InputError, JobError, out_of_memory
from wan.utils.files import LockedElsewhere, clean_up
from wan.utils.progress import Batch, Progress, duration, quantity, tell

ALONE = Runtime()
Result = TypeVar("Result")
FAILURES = ("failed", "not joined")
Load = Callable[[Plan, Progress, Runtime], Pipeline]


def open_pipeline(plan: Plan, progress: Progress, runtime: Runtime) -> Pipeline:
    """The pipeline of the plan's task; its networks are not loaded yet."""
    public: type[Pipeline] = resolve_name(plan.config.public_class)
    return public.of_plan(plan, progress, runtime)


def run_jobs(plan: Plan, progress: Progress, runtime: Runtime = ALONE, load: Load = open_pipeline) -> int:
    """Make every video of `plan` that is not there yet; return the number of failed jobs of all processes. `load` makes
    the pipeline. InputError, before anything is made: a file is in the way, or the models cannot be loaded."""
    world = runtime.team
    check_ranks(world, plan)
    progress.start()
    jobs, places = world.broadcast(lambda: jobs_to_do(plan, progress))
    plan = replace(plan, jobs=places)
    joined = world.broadcast(lambda: join_chains(plan, jobs, progress))
    events: list[Event] = []
    if jobs:
        pipe = world.all_or_none(lambda: load(plan, progress, runtime))
        in_turn = sorted(chains(jobs), key=lambda chain: chain[0].variant)  # changes of weights are few
        own = in_turn[pipe.mesh.data_rank :: pipe.mesh.layout.data]
        team, mine = pipe.mesh.team, [job for chain in own for job in chain]
        texts = [text for job in mine for text in plan.texts(job)]
        world.all_or_none(lambda: _within_memory(pipe.load_text_encoder) if texts else None)
        team.all_or_none(lambda: _within_memory(lambda: pipe.encode(texts)))
        pipe.release_text_encoder()
        world.all_or_none(lambda: _within_memory(pipe.load_networks) if mine else None)
        try:
            _make_all(pipe, mine, runtime, events)
        except KeyboardInterrupt:
            _sum_up(plan, len(jobs), events, progress)
            raise
        by_group = world.gather(events if team.is_rank0 else [])  # the processes of a group have seen the same events
        for kind, facts in (event for group in by_group[1:] for event in group):
            progress.event(kind, facts)
        events = [event for group in by_group for event in group]
        if pipe.experts and not Accelerator(plan.device).failure and pipe.experts.waited > 0.5:
            waited, read = duration(pipe.experts.waited), quantity(pipe.experts.brought, "B")
            progress.say(f"computation waited {waited} for weights, of which {read} were read")
    events = joined + events
    _sum_up(plan, len(jobs), events, progress)
    return sum(kind in FAILURES for kind, _ in events)


def jobs_to_do(plan: Plan, progress: Progress) -> tuple[list[Job], tuple[Job, ...]]:
    """(jobs that are not done; all jobs, each with the path of its video). InputError names every file in the way."""
    todo, whole, places, problems = list[Job](), list[Job](), list[Job](), list[str]()
    for job, state in find_videos(plan):
        if state.kind == "equal":
            state = _copy(plan, job, state, progress)
        places.append(replace(job, save_file=state.file))
        try:
            (whole if _is_there(plan, job, state, progress) else todo).append(places[-1])
        except JobError as error:
            problems.append(str(error))
    all_joined = sorted({job.joined for job in plan.jobs if job.joined})
    clean_up([*(job.save_file for job in whole), *all_joined], progress.say)
    for joined in all_joined:
        if joined.exists() and clips_of(joined) is None and not plan.request.overwrite:
            problems.append(f"{joined} already exists, and no clips were joined to make it; --overwrite replaces it")
    if problems:
        raise InputError(problems)
    return todo, tuple(places)


def _copy(plan: Plan, job: Job, state: State, progress: Progress) -> State:
    # an equal video gets the name that the user chose; where that fails, it is made
    try:
        with ExitStack() as locks:
            hold_lock(locks, job.save_file, progress)
            copy_video(state.file, job.save_file, latents=plan.request.save_latents)
    except (JobError, OSError) as error:
        progress.say(f"{state.file} cannot be copied to {job.save_file}: {reason(error)}")
        return State("nothing", job.save_file)
    progress.say(f"{job.save_file} is a copy of {state.file}, which is the same video")
    return State("whole", job.save_file)


def _make_all(pipe: Pipeline, jobs: list[Job], runtime: Runtime, events: list[Event]) -> None:
    plan, team, progress = pipe.plan, pipe.mesh.team, pipe.progress
    shared, last = dict(progress.seconds), {job.variant: job for job in jobs}
    progress.batch = Batch([work_of(plan, job) for job in jobs])
    for chain in chains(jobs):
        for number, job in enumerate(chain, 1):
            if team.broadcast(runtime.has_stopped):
                return
            with progress.about(index=job.index):
                kind, facts = _attempt(plan, pipe, job, shared, again=job is not last[job.variant])
            events.append((kind, facts))
            progress.event(kind, facts)
            if kind == "failed":
                if failure := next(filter(None, team.gather(Accelerator(plan.device).failure)), ""):
                    progress.say(f"{plan.device} has failed ({failure}); the same command with --resume goes on")
                if failure or plan.request.on_error == "stop":
                    runtime.stop()
                    return
            if kind in ("failed", "elsewhere"):
                for left in chain[number:]:
                    progress.say(f"{left.save_file} is not made: it goes on from {job.save_file}")
                break
        else:
            if joined := chain[0].joined:  # with the clips that were there before
                whole = [job for job in plan.jobs if job.joined == joined]
                events += team.broadcast(partial(join, plan, whole, progress))


def _attempt(plan: Plan, pipe: Pipeline, job: Job, shared: dict[str, float], *, again: bool) -> Event:
    team, progress = pipe.mesh.team, pipe.progress
    left = progress.batch.left(time.perf_counter())
    progress.say(f"video {plan.place(job)}: {job.save_file}{f' ({left})' if left else ''}")
    facts: dict[str, Any] = {"index": job.index, "file": str(job.save_file)}
    resumed = job.follows and plan.request.resume  # the clip before it is there now
    try:
        if resumed and team.broadcast(lambda: _is_there(plan, job, find_video(plan, job), progress)):
            return "there", facts
        if plan.variants:
            pipe.follow(plan.of(job))
        with progress.batch.video(work_of(plan, job)):
            facts["frames"] = make_video(pipe, job, shared, again=again)
        return "saved", facts
    except LockedElsewhere as error:
        progress.say(str(error))
        return "elsewhere", facts
    except Exception as error:  # noqa: BLE001 - one job must not end a batch; a bug's traceback is shown
        if traceback := origin_of(error)[1]:
            progress.say(traceback)
            if progress.quiet and team.is_rank0:  # the summary will not have it
                tell(sys.stderr, f"{traceback}\n")
        facts["reason"] = "; ".join([f"{job.source}: {reason(error, job)}", *getattr(error, "__notes__", [])])
        progress.say(f"failed: {facts['reason']}")
        return "failed", facts


def _is_there(plan: Plan, job: Job, state: State, progress: Progress) -> bool:
    """Whether the video is whole; then the files beside it are repaired. JobError if another file is in the way."""
    if state.kind == "other" and not plan.request.overwrite:
        raise JobError(f"{job.save_file} {state.trouble}; --overwrite replaces it")
    if state.kind == "whole":
        repair(plan, job, state.file, progress.say)
        progress.say(f"video {plan.place(job)} is there already: {state.file}")
    return state.kind == "whole"


def decode_only(
    plan: Plan, file: Path, save_file: Path, progress: Progress, runtime: Runtime = ALONE, load: Load = open_pipeline
) -> None:
    """Finish a job from its kept latents: of the models only the VAE is loaded. InputError, JobError."""
    world, request = runtime.team, plan.request
    latent, record = world.all_or_none(lambda: read_latents(file, plan.config))
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    if request.dry_run:
        return
    if world.broadcast(save_file.exists) and not request.overwrite:
        raise InputError(f"--save_file {save_file} already exists; --overwrite replaces it")
    with ExitStack() as locks:
        world.broadcast(lambda: hold_lock(locks, save_file, progress))
        pipe = world.all_or_none(lambda: load(plan, progress, runtime))
        if pipe.mesh.data_rank:
            return  # one video is one group's work
        team = pipe.mesh.team
        team.all_or_none(lambda: _within_memory(pipe.load_vae))
        try:
            frames = decode_and_save(pipe, latent, save_file, record, {})
            if request.preview:
                team.broadcast(lambda: save_contact_sheet(save_file, frames))
        except Exception as e:  # all others are raised again
            if not isinstance(e, OSError) and not out_of_memory(e):
                raise
            raise JobError(f"{save_file}: {reason(e)}; {file} is as it was") from e
    progress.event("saved", {"index": 0, "file": str(save_file), "frames": frames})
    progress.say(f"saved {save_file}")
    progress.say(progress.table())


def _within_memory(work: Callable[[], Result]) -> Result:
    """`work()`, which loads something. JobError if the device's memory does not suffice."""
    try:
        return work()
    except Exception as e:  # memory errors come as many kinds; all others are raised again
        if not out_of_memory(e):
            raise
        raise JobError(reason(e)) from e


def _sum_up(plan: Plan, tried: int, events: list[Event], progress: Progress) -> None:
    kinds, jobs = [kind for kind, _ in events], len(plan.jobs)
    saved, there, failed, elsewhere = map(kinds.count, ("saved", "there", "failed", "elsewhere"))
    counts = {
        "saved": saved, "there already": jobs - tried + there, "failed": failed,
        "being made by other processes": elsewhere, "not tried": tried - saved - there - failed - elsewhere,
        "joined": kinds.count("joined"), "not joined": kinds.count("not joined"),
    }  # fmt: skip
    progress.event("summary", counts)
    progress.say(progress.table())
    folders = sorted({str(Path(facts["file"]).parent) for kind, facts in events if kind in ("saved", "joined")})
    more = f" and {len(folders) - 1} more folders" if folders[1:] else ""
    where = f" in {folders[0]}{more}" if folders else ""
    progress.say(", ".join(f"{count} {what}" for what, count in counts.items() if count) + where)
    for kind, facts in events if jobs > 1 else ():
        if kind in FAILURES:
            progress.say(f"  {facts['reason']}")
    if counts["failed"] or counts["not tried"] or counts["not joined"]:
        command = shlex.join(words_of(replace(plan.request, resume=True, overwrite=False)))
        again = "the same command" if plan.request.resume else f"{program()} {command}"
        progress.say(f"to go on from here: {again}")
