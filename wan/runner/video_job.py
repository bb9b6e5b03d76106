"""One video from start to end: lock, sample, keep the latents, decode, write; and the clips of a chain joined into one.
Joining copies packets, so every frame is bit for bit the clip's. It drops the first frame of a clip that follows, which
the model made of the last frame before; decoding can start at its second frame (`VideoWriter.follows`)."""

from __future__ import annotations

import hashlib
import math
import shlex
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan.cli.options import SCHEMA, Request
from wan.cli.parser import program, to_decode, words_of
from wan.jobs.job import Job, chains, frames_joined
from wan.media.images import save_contact_sheet
from wan.media.video import VideoWriter, count_frames, file_argument, publish, read_record, rounded
from wan.pipeline import FINER, Pipeline, retry_smaller
from wan.planning.plan import Plan
from wan.runner.record import describe, find_latents, find_video, in_video, key_of, outcome, save_latents, versions
from wan.utils.errors import InputError, JobError, WanError, first_line, out_of_memory
from wan.utils.files import Beside, LockedElsewhere, latents_elsewhere, locked, make_part
from wan.utils.progress import STAGE, Progress, peak_memory, quantity

# The outcome of a job ("saved", "failed", "elsewhere", "there") or of a chain ("joined", "not joined"), and its facts.
Event = tuple[str, dict[str, Any]]
# Flags that lower the memory of a stage.
LESS_MEMORY = {
    "text": "--t5_cpu encodes the prompts on the CPU",
    "load": "--offload_model True keeps idle networks in host memory, --t5_cpu the text encoder",
    "denoise": "a smaller --size or --frame_num needs less, --offload_model True keeps idle networks in host memory",
    "decode": "a smaller --size needs less",
}
OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF=expandable_segments:False may help: some drivers do not map memory in pieces"


def make_video(pipe: Pipeline, job: Job, shared: dict[str, float], *, again: bool) -> int:
    """Make the video of `job` and return the number of its frames. JobError, OSError, LockedElsewhere, out of memory.
    shared: seconds by stage that all jobs share. again: another video follows."""
    plan, team, progress = pipe.plan, pipe.mesh.team, pipe.progress
    with ExitStack() as locks:
        team.broadcast(lambda: hold_lock(locks, job.save_file, progress))
        earlier = {name: spent - shared.get(name, 0.0) for name, spent in progress.seconds.items()}
        record = team.broadcast(lambda: describe(plan, job, pipe.info()))
        latent, kept = team.broadcast(lambda: _latents_of_before(plan, job, progress))
        if latent is None:
            latent = pipe.sample_job(job, again=again)
            record |= pipe.computed()
            # before decoding: not even a killed process loses the steps
            kept = team.broadcast(lambda: _keep(job.save_file, latent, record, progress))
        try:
            frames = decode_and_save(pipe, latent, job.save_file, record, earlier)
        except BaseException as error:
            hint = "and the finished latents could not be kept"
            if kept:  # on the CPU if the device had no memory for tiles
                changes = {"device": "cpu", "vram": None} if out_of_memory(error) else {}
                words = words_of(to_decode(plan.request, kept, job.save_file, **changes))
                hint = f"the finished latents are kept; to make the video of them: {program()} {shlex.join(words)}"
            error.add_note(hint)
            if not isinstance(error, Exception):  # interrupted: nobody reports it later
                progress.say(hint)
            raise
        team.broadcast(lambda: _tidy(plan.request, job, kept, frames, progress))
    return frames


def decode_and_save(
    pipe: Pipeline, latent: torch.Tensor, path: Path, record: dict[str, Any], earlier: dict[str, float]
) -> int:
    """Decode into the file; return the number of frames. earlier: seconds by stage that are not this video's."""
    team, progress = pipe.mesh.team, pipe.progress

    def attempt(finer: bool) -> int:
        with closing(pipe.decode(latent, finer=finer, convert=partial(rounded, source=path))) as chunks:
            if team.is_rank0:
                return write(chunks)
            deque(chunks, maxlen=0)  # gives none, but takes this process's part in them
        team.barrier()
        return 0

    def write(chunks: Iterable[torch.Tensor]) -> int:
        fps, how = pipe.plan.config.sample_fps, pipe.plan.request.record
        with VideoWriter(path, fps, follows=bool(record["job"].get("follows"))) as video:
            length = (latent.shape[1] - 1) * pipe.plan.config.vae_stride[0] + 1
            with progress.stage("decode", total=length, unit="frame"):
                for chunk in chunks:
                    video.write(chunk)
                    progress.advance(chunk.shape[1])
            team.barrier()  # the file appears when nobody has failed
            with progress.stage("save"):
                spent = {name: s - earlier.get(name, 0.0) for name, s in progress.seconds.items()}
                spent = {name: round(seconds, 3) for name, seconds in spent.items() if seconds > 0}
                whole = record | {"seconds": spent, "peak_memory_bytes": peak_memory()}
                whole |= outcome(path, video.frames, video.size or (0, 0), fps)
                video.finish(whole, partial(in_video, how=how))
        return video.frames

    return retry_smaller(progress, FINER, lambda finer: team.all_or_none(lambda: attempt(finer)))


def hold_lock(locks: ExitStack, save_file: Path, progress: Progress) -> None:
    """Hold the lock of the video until `locks` closes. LockedElsewhere; JobError if the folder takes no files."""
    try:
        save_file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save_file.parent).close()
    except OSError as e:
        raise JobError(f"{save_file.parent}: no file can be written there ({e.strerror})") from e
    locks.enter_context(locked(save_file, progress.say))


def reason(error: Exception, job: Job | None = None) -> str:
    """Why a job failed, in a line; if memory ran out, with the size of the video."""
    if out_of_memory(error):
        stage = getattr(error, STAGE, "")
        where = f" in {stage}" if stage else ""
        where += f" of {job.size[0]}x{job.size[1]}, {quantity(job.frame_num, 'frame')}" if job else ""
        hint = f"; {LESS_MEMORY[stage]}" if stage in LESS_MEMORY else ""
        return f"out of memory on the device ({first_line(error).rstrip('. ')}){where}{hint}"
    hint = f"; {OLD_ALLOCATOR}" if "CUDA driver error" in str(error) else ""  # PyTorch's allocator fails so
    return str(error) if isinstance(error, WanError) else f"{type(error).__name__}: {first_line(error)}{hint}"


def _latents_of_before(plan: Plan, job: Job, progress: Progress) -> tuple[torch.Tensor | None, Path | None]:
    """(latents, their file) of an earlier try, with `--resume`. LockedElsewhere if the video is made by now."""
    resume, overwrite = plan.request.resume, plan.request.overwrite
    if find_video(plan, job).kind == "whole" if resume else job.save_file.exists() and not overwrite:
        raise LockedElsewhere(f"{job.save_file}: another process has just made it")
    file, latent, _ = (find_latents(plan, job) if resume else None) or (None, None, None)
    if file:
        progress.say(f"the latents of an earlier try are used: {file}")
    return latent, file


def _keep(save_file: Path, latent: torch.Tensor, record: dict[str, Any], progress: Progress) -> Path | None:
    for place in (lambda: Beside.of(save_file).latents, lambda: latents_elsewhere(save_file, make=True)):
        try:
            path = place()
            save_latents(path, latent, record)
            return path
        except OSError as e:
            progress.say(f"warning: the latents cannot be kept as {e.filename or path} ({e.strerror})")
    return None


def _tidy(request: Request, job: Job, kept: Path | None, frames: int, progress: Progress) -> None:
    if kept and not request.save_latents:
        with suppress(OSError):  # the video is whole, whatever the file server says to this
            kept.unlink()
    if request.save_latents and kept != Beside.of(job.save_file).latents:
        raise JobError(f"{job.save_file}: saved, but not its latents ({kept or 'no folder took them'})")
    if request.preview:
        save_contact_sheet(job.save_file, frames)
    progress.say(f"saved {job.save_file}")


def join(plan: Plan, clips: Sequence[Job], progress: Progress) -> list[Event]:
    """Join the whole videos of a chain, and return the outcome; empty if another process joins them."""
    joined, frames, fps = clips[0].joined, frames_joined(clips), plan.config.sample_fps
    assert joined is not None, "these clips are in a chain"
    record = {"schema": SCHEMA, "task": plan.request.task, "clips": _entries(plan, clips), "versions": versions()}
    record |= outcome(joined, frames, clips[0].size, fps)
    kind, facts = "joined", {"file": str(joined)}
    try:
        with ExitStack() as locks, progress.stage("join"):
            hold_lock(locks, joined, progress)
            copy_together([clip.save_file for clip in clips], joined, fps, frames, record, plan.request.record)
        if plan.request.preview:
            save_contact_sheet(joined, frames)
        progress.say(f"joined {len(clips)} videos, {frames} frames: {joined}")
    except LockedElsewhere as error:
        progress.say(str(error))
        return []
    except (JobError, OSError) as error:
        kind = "not joined"
        facts["reason"] = f"{joined}: the clips are there, but could not be joined: {reason(error)}"
        progress.say(f"failed: {facts['reason']}")
    progress.event(kind, facts)
    return [(kind, facts)]


def join_chains(plan: Plan, todo: Sequence[Job], progress: Progress) -> list[Event]:
    """Join the chains whose clips are all there and whose joined video is not; return the outcomes."""
    unfinished, events = {None, *(job.joined for job in todo)}, list[Event]()
    for chain in chains(plan.jobs):
        if (joined := chain[0].joined) is None or joined in unfinished:
            continue
        if clips_of(joined) != _entries(plan, chain) or count_frames(joined) != frames_joined(chain):
            events += join(plan, chain, progress)
    return events


def clips_of(joined: Path) -> list[dict[str, Any]] | None:
    """The clips in the record of a joined video; None if there is no such video."""
    with suppress(InputError):  # no such record
        clips = read_record(joined).get("clips")
        return clips if isinstance(clips, list) else None
    return None


def copy_together(
    clips: Sequence[Path], joined: Path, fps: int, frames: int, record: dict[str, Any] | None = None, how: str = "full"
) -> None:
    """Copy `clips`, which follow each other, into `joined`, of `frames` frames. JobError if one does not follow."""
    listing = make_part(joined)
    second = math.ceil(1e6 / fps) / 1e6  # where the second frame is; the list counts in microseconds
    try:
        with listing.open("w", encoding="utf-8") as file:
            file.write("ffconcat version 1.0\n")
            for number, clip in enumerate(clips):
                escaped = file_argument(clip.absolute()).replace("'", r"'\''")
                file.write(f"file '{escaped}'\n" + (f"inpoint {second:.6f}\n" if number else ""))
        source = ["-f", "concat", "-safe", "0", "-i", file_argument(listing)]
        publish(joined, source, frames, record, partial(in_video, how=how))
    finally:
        listing.unlink(missing_ok=True)


def _entries(plan: Plan, clips: Sequence[Job]) -> list[dict[str, Any]]:
    return [
        {
            "file": clip.save_file.name, "prompt": clip.prompt, "seed": clip.seed, "frames": clip.frame_num,
            "meaning": hashlib.sha256(key_of(plan.meaning(clip)).encode()).hexdigest(),
        }
        for clip in clips
    ]  # fmt: skip
