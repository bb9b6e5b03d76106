"""From a plan to videos on disk: texts first, then each job alone; a failed one is reported and the others go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import wan
from wan.distributed.launch import Runtime
from wan.distributed.process_group import Team, origin_of
from wan.jobs.chains import chains
from wan.jobs.job import Job
from wan.media.previews import save_contact_sheet
from wan.pipeline import Pipeline
from wan.planning.plan import Plan
from wan.runner.join_clips import clips_of, is_joined, join
from wan.runner.record import Found, find_video, find_videos, read_latents, repair
from wan.runner.video_job import check_place, hold_lock, make_video, reason, save_video
from wan.utils.errors import InputError, JobError, out_of_memory
from wan.utils.locks import LockedElsewhere, clean_up
from wan.utils.progress import Batch, Progress, duration, quantity, tell

ALONE = Runtime()
TOLD_WAIT = 0.5  # seconds
Result = TypeVar("Result")
# What a job came to, "saved", "failed", "elsewhere" or "there"; or a chain, "joined" or "not joined"; and its facts.
Event = tuple[str, dict[str, Any]]
FAILURES = ("failed", "not joined")


def open_pipeline(plan: Plan, progress: Progress, runtime: Runtime) -> Pipeline:
    """The pipeline of the plan's task; its networks are not loaded yet."""
    public: type[Pipeline] = getattr(wan, plan.config.public_class.partition(":")[2])
    return public.of_plan(plan, progress, runtime)


def run_jobs(
    plan: Plan,
    progress: Progress,
    runtime: Runtime = ALONE,
    load: Callable[[Plan, Progress, Runtime], Pipeline] = open_pipeline,
) -> int:
    """Make every video of `plan` that is not there yet; the number of jobs that failed, of all processes.

    A failed job is reported and the others go on, unless `on_error` is "stop". load: makes the pipeline.
    InputError, before anything is made: a file is in the way, or the models cannot be loaded.
    """
    world = runtime.team
    jobs, places = world.broadcast(lambda: jobs_to_do(plan, progress))
    plan, events = replace(plan, jobs=places), list[Event]()
    joined = world.broadcast(lambda: _join_whole(plan, jobs, progress))
    if jobs:
        pipe = world.all_or_none(lambda: load(plan, progress, runtime))
        team, mine = pipe.mesh.team, [job for chain in pipe.mesh.share(chains(jobs)) for job in chain]
        texts = [text for job in mine for text in pipe.texts(job)]
        world.all_or_none(lambda: _with_room(pipe.load_text_encoder) if texts else None)
        team.all_or_none(lambda: _with_room(lambda: pipe.encode(texts)))
        pipe.release_text_encoder()
        world.all_or_none(lambda: _with_room(pipe.load_networks) if mine else None)
        try:
            _make_all(pipe, mine, progress, runtime, events)
        except KeyboardInterrupt:
            _sum_up(len(plan.jobs), len(jobs), events, progress)
            progress.say("the same command with --resume goes on from here")
            raise
        everyones = world.gather(events if team.is_rank0 else [])  # in a group all have seen the same ones
        for kind, facts in (event for theirs in everyones[1:] for event in theirs):
            progress.event(kind, facts)
        events = [event for theirs in everyones for event in theirs]
        if pipe.experts and pipe.experts.waited > TOLD_WAIT:
            waited, brought = duration(pipe.experts.waited), quantity(pipe.experts.brought, "B")
            progress.say(f"computation waited {waited} for weights, of which {brought} were read")
    events = joined + events
    _sum_up(len(plan.jobs), len(jobs), events, progress)
    return sum(kind in FAILURES for kind, _ in events)


def _make_all(pipe: Pipeline, jobs: list[Job], progress: Progress, runtime: Runtime, events: list[Event]) -> None:
    """This group's jobs, one after the other; what each came to joins `events`."""
    shared, team = dict(progress.seconds), pipe.mesh.team
    progress.batch = Batch([pipe.plan.video(job).tokens for job in jobs])
    for chain in chains(jobs):
        for place, job in enumerate(chain, 1):
            if team.broadcast(runtime.has_stopped):
                return
            with progress.about(index=job.index):
                kind, facts = _attempt(pipe, job, progress, shared, again=job is not jobs[-1])
            events.append((kind, facts))
            progress.event(kind, facts)
            if kind == "failed" and pipe.plan.request.on_error == "stop":
                runtime.stop()
                return
            if kind in ("failed", "elsewhere"):
                if left := chain[place:]:
                    more = f", nor are the {len(left) - 1} after it" if left[1:] else ""
                    progress.say(f"{left[0].save_file} is not made: it goes on from {job.save_file}{more}")
                break
        else:
            events += _join_together(pipe, chain[0].joined, progress)


def _join_together(pipe: Pipeline, joined: Path | None, progress: Progress) -> list[Event]:
    return pipe.mesh.team.broadcast(lambda: _join(pipe.plan, joined, progress)) if joined else []


def _attempt(pipe: Pipeline, job: Job, progress: Progress, shared: dict[str, float], *, again: bool) -> Event:
    """Make one video; what came of it. again: another video follows."""
    team = pipe.mesh.team
    left = progress.batch.left(time.perf_counter())
    progress.say(f"video {pipe.plan.place(job)}: {job.save_file}{f' ({left})' if left else ''}")
    facts: dict[str, Any] = {"index": job.index, "file": str(job.save_file)}
    try:
        if job.follows and team.broadcast(lambda: _is_there(pipe.plan, job, progress)):
            return "there", facts
        with progress.batch.video(pipe.plan.video(job).tokens):
            facts["frames"] = make_video(pipe, job, progress, shared, again=again)
        return "saved", facts
    except LockedElsewhere as error:
        progress.say(str(error))
        return "elsewhere", facts
    except Exception as error:  # noqa: BLE001 - one job must not end a batch; a bug's traceback is shown
        facts["reason"] = _report(pipe.plan, job, error, progress, team)
        return "failed", facts


def _is_there(plan: Plan, job: Job, progress: Progress) -> bool:
    """Whether `--resume` finds this clip done, now that the one before it is. JobError if another is in the way."""
    if not plan.request.resume:
        return False
    found = find_video(plan, job)
    if found.state == "other" and not plan.request.overwrite:
        raise JobError(f"{job.save_file}: {_trouble(found)}; --overwrite replaces it")
    if found.state == "whole":
        _tell_of(plan, job, found, progress)
    return found.state == "whole"


def _join_whole(plan: Plan, to_do: list[Job], progress: Progress) -> list[Event]:
    """Join the chains whose clips are all there, but not the video of them; what came of it."""
    unfinished = {job.joined for job in to_do}
    whole = [chain for chain in chains(plan.jobs) if chain[0].joined not in unfinished]
    paths = [chain[0].joined for chain in whole if not is_joined(plan, chain)]
    return [event for path in paths if path for event in _join(plan, path, progress)]


def _join(plan: Plan, joined: Path, progress: Progress) -> list[Event]:
    """Join a chain whose clips are all there; what came of it, nothing if another process is at it."""
    facts: dict[str, Any] = {"file": str(joined)}
    try:
        join(plan, [job for job in plan.jobs if job.joined == joined], progress)
        kind = "joined"
    except LockedElsewhere as error:
        progress.say(str(error))
        return []
    except (JobError, OSError) as error:
        facts["reason"] = f"{joined}: the clips are there, but could not be joined: {reason(error)}"
        progress.say(f"failed: {facts['reason']}")
        kind = "not joined"
    progress.event(kind, facts)
    return [(kind, facts)]


def decode_only(
    plan: Plan,
    latents_file: Path,
    save_file: Path,
    progress: Progress,
    runtime: Runtime = ALONE,
    load: Callable[[Plan, Progress, Runtime], Pipeline] = open_pipeline,
) -> None:
    """Finish a job from its kept latents: of the models only the VAE is loaded. InputError, JobError."""
    world, request = runtime.team, plan.request
    latent, record = world.all_or_none(lambda: read_latents(latents_file, plan.config))
    world.broadcast(lambda: _check_file(request.overwrite, save_file))
    pipe = world.all_or_none(lambda: load(plan, progress, runtime))
    if pipe.mesh.data_rank:
        return  # one video is one group's work
    team = pipe.mesh.team
    team.all_or_none(lambda: _with_room(pipe.load_vae))
    with ExitStack() as locks:
        team.broadcast(lambda: hold_lock(locks, save_file, progress))
        try:
            frames = save_video(pipe, latent, save_file, record, progress, {})
            if request.preview:
                team.broadcast(lambda: save_contact_sheet(save_file, frames))
        except Exception as e:
            if not isinstance(e, OSError) and not out_of_memory(e):
                raise
            raise JobError(f"{save_file}: {reason(e)}; {latents_file} is as it was") from e
    progress.event("saved", {"index": 0, "file": str(save_file), "frames": frames})
    progress.say(f"saved {save_file}")
    progress.say(progress.table())


def jobs_to_do(plan: Plan, progress: Progress) -> tuple[list[Job], tuple[Job, ...]]:
    """(jobs that `--resume` does not find done; all of them, each with the place where its video is or will be).

    InputError naming every file that is in the way.
    """
    todo, places, whole, problems = [], [], [], []
    for job, found in find_videos(plan):
        places.append(replace(job, save_file=found.file))
        if found.state == "whole":
            whole.append(found.file)
            _tell_of(plan, job, found, progress)
            continue
        if found.state == "other" and not plan.request.overwrite:
            problems.append(f"{job.save_file}: {_trouble(found)}; --overwrite replaces it")
        todo.append(job)
    all_joined = sorted({job.joined for job in plan.jobs if job.joined})
    clean_up([*whole, *all_joined], progress.say)
    for joined in all_joined:
        if joined.exists() and clips_of(joined) is None and not plan.request.overwrite:
            problems.append(f"{joined}: exists already, and is not joined of clips; --overwrite replaces it")
    if problems:
        raise InputError(problems)
    return todo, tuple(places)


def _tell_of(plan: Plan, job: Job, found: Found, progress: Progress) -> None:
    """Of a video that is whole, and of what was put right beside it."""
    for done in repair(plan, job, found):
        progress.say(done)
    progress.say(f"video {plan.place(job)} is there already: {found.file}")


def _trouble(found: Found) -> str:
    if found.differing is None:
        return "exists already"
    return "was made with other settings" + (f" ({', '.join(found.differing)})" if found.differing else "")


def _with_room(work: Callable[[], Result]) -> Result:
    """`work()`, which loads something; JobError where the device has no room for it."""
    try:
        return work()
    except Exception as e:
        if not out_of_memory(e):
            raise
        raise JobError(reason(e)) from e


def _check_file(overwrite: bool, save_file: Path) -> None:
    if save_file.exists() and not overwrite:
        raise InputError(f"--save_file {save_file}: exists already; --overwrite replaces it")
    check_place(save_file)


def _report(plan: Plan, job: Job, error: Exception, progress: Progress, team: Team) -> str:
    """Say that a job failed and why; the sentence comes back for the summary."""
    if told := origin_of(error).traceback:
        progress.say(told)
        if progress.quiet and team.is_rank0:  # the summary will not have it
            tell(sys.stderr, f"{told}\n")
    sentence = "; ".join([f"{job.source}: {reason(error, plan, job)}", *getattr(error, "__notes__", [])])
    progress.say(f"failed: {sentence}")
    return sentence


def _sum_up(jobs: int, tried: int, events: list[Event], progress: Progress) -> None:
    kinds = [kind for kind, _ in events]
    counts = {
        "saved": kinds.count("saved"),
        "there already": jobs - tried + kinds.count("there"),
        "failed": kinds.count("failed"),
        "being made by other processes": kinds.count("elsewhere"),
        "not tried": tried - sum(kinds.count(kind) for kind in ("saved", "there", "failed", "elsewhere")),
        "joined": kinds.count("joined"),
        "not joined": kinds.count("not joined"),
    }
    progress.event("summary", counts)
    progress.say(progress.table())
    progress.say(", ".join(f"{count} {what}" for what, count in counts.items() if count))
    if jobs > 1:
        for facts in (facts for kind, facts in events if kind in FAILURES):
            progress.say(f"  {facts['reason']}")
