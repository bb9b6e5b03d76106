"""From checked jobs to videos on disk: texts first, then each job alone; what is finished is never lost.

Shapes: C latent channels, T latent frames, h, w latent height and width; t, H, W those of decoded frames.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan.distributed.runtime import Runtime
from wan.distributed.team import Team, origin_of
from wan.pipeline import Pipeline
from wan.plan import Plan
from wan.record import completed, describe, found_at_place, read_latents, save_latents
from wan.request.settings import Job, Run, Settings
from wan.utils.errors import InputError, JobError, WanError
from wan.utils.progress import Progress
from wan.utils.video import VideoWriter, save_contact_sheet

ALONE = Runtime()


def run_jobs(
    run: Run,
    plan: Plan,
    progress: Progress,
    load: Callable[[Settings, Progress], Pipeline] | None = None,
    runtime: Runtime = ALONE,
) -> int:
    """Make every video of `run` that is not there yet; the number of jobs that failed, of all processes.

    A failed job is reported and the others go on, unless `on_error` is "stop". load: opens the models; default
    `Pipeline`. InputError, before anything is made: a file is in the way, or the models cannot be loaded.
    """
    facts, world = plan.as_dict(), runtime.team
    jobs = world.from_first(lambda: jobs_to_do(run, facts, progress))
    failures: list[str] = []
    saved = 0
    if jobs:
        opened = load or partial(Pipeline, runtime=runtime)
        pipe = world.agree(lambda: opened(run.settings, progress))
        team = pipe.mesh.team
        mine = pipe.mesh.share(jobs)
        texts = [text for job in mine for text in pipe.texts(job)]
        world.agree(lambda: pipe.load_text_encoder() if texts else None)
        team.agree(lambda: pipe.encode(texts))
        pipe.release_text_encoder()
        world.agree(lambda: pipe.load_networks() if mine else None)
        shared = dict(progress.seconds)
        for job in mine:
            if team.from_first(runtime.has_stopped):
                break
            progress.say(f"video {job.index + 1} of {len(run.jobs)}: {job.save_file}")
            try:
                _make(run, job, facts, pipe, progress, shared)
                saved += 1
            except Exception as error:  # noqa: BLE001 - one job must not end a batch; a bug's traceback is shown
                failures.append(_report(job, error, progress, team))
                if run.settings.on_error == "stop":
                    runtime.stop()
                    break
        everyones = world.gather((saved, failures) if team.first else (0, []))  # in a group all have counted the same
        saved, failures = sum(count for count, _ in everyones), [told for _, failed in everyones for told in failed]
    _sum_up(run, saved, len(jobs), failures, progress)
    return len(failures)


def decode_only(
    settings: Settings,
    latents_file: Path,
    save_file: Path,
    progress: Progress,
    load: Callable[[Settings, Progress], Pipeline] | None = None,
    runtime: Runtime = ALONE,
) -> None:
    """Finish a job from its kept latents: of the models only the VAE is loaded. InputError, JobError."""
    world = runtime.team
    latent, record = world.agree(lambda: read_latents(latents_file))
    if (made_for := record["settings"]["task"]) != settings.task:
        raise InputError(f"--decode_latents {latents_file}: made with --task {made_for}, not {settings.task}")
    world.from_first(lambda: _check_file(settings, save_file))
    opened = load or partial(Pipeline, runtime=runtime)
    pipe = world.agree(lambda: opened(settings, progress))
    if pipe.mesh.data_rank:
        return  # one video is one group's work
    try:
        frames = _save_video(pipe, latent, save_file, settings, record, progress, {})
        if settings.preview:
            pipe.mesh.team.from_first(lambda: save_contact_sheet(save_file, frames))
    except (OSError, torch.OutOfMemoryError) as e:
        raise JobError(f"{save_file}: {_reason(e)}; {latents_file} is as it was") from e
    progress.say(f"saved {save_file}")
    progress.say(progress.table())


def jobs_to_do(run: Run, plan: dict[str, Any], progress: Progress) -> list[Job]:
    """Without those that `--resume` finds done. InputError naming every file that is in the way."""
    settings = run.settings
    trouble = "was made with other settings" if settings.resume else "exists already"
    todo, problems = [], []
    for job in run.jobs:
        if settings.resume:
            found = found_at_place(run, job, plan)
        else:
            found = "other" if job.save_file.exists() else "nothing"
        if found == "whole":
            progress.say(f"video {job.index + 1} of {len(run.jobs)} is there already: {job.save_file}")
            continue
        if found == "other" and not settings.overwrite:
            problems.append(f"{job.save_file}: {trouble}; --overwrite replaces it")
        todo.append(job)
    if problems:
        raise InputError(problems)
    return todo


def _make(
    run: Run, job: Job, plan: dict[str, Any], pipe: Pipeline, progress: Progress, shared: dict[str, float]
) -> None:
    """One job, start to end. shared: seconds by stage that all jobs share (loading, texts).

    Of the processes that make it together, the first one alone writes files; all of them see the same errors.
    """
    settings, team = run.settings, pipe.mesh.team
    earlier = {name: spent - shared.get(name, 0.0) for name, spent in progress.seconds.items()}
    team.from_first(lambda: _check_place(job.save_file))
    record = team.from_first(lambda: describe(run, job, plan, pipe.info()))
    latent = pipe.sample(job)
    # before decoding: not even a killed process loses the steps
    kept = team.from_first(lambda: _keep(job.save_file, latent, record, progress))
    try:
        frames = _save_video(pipe, latent, job.save_file, settings, record, progress, earlier)
    except BaseException as error:
        hint = _how_to_finish(settings, job.save_file, kept, error)
        error.add_note(hint)
        if not isinstance(error, Exception):  # interrupted: nobody reports it later
            progress.say(hint)
        raise
    progress.event("saved", {"index": job.index, "file": str(job.save_file), "frames": frames})
    team.from_first(lambda: _tidy(settings, job, kept, frames, progress))


def _tidy(settings: Settings, job: Job, kept: Path | None, frames: int, progress: Progress) -> None:
    """What is left to do beside a finished video."""
    if kept and not settings.save_latents:
        kept.unlink()
    if settings.save_latents and kept != _latents_beside(job.save_file):
        raise JobError(f"{job.save_file}: saved, but not its latents ({kept or 'there is no room for them'})")
    written = [job.save_file, job.save_file.with_suffix(".json")]
    if settings.preview:
        written.append(save_contact_sheet(job.save_file, frames))
    progress.say(f"saved {', '.join(map(str, written))}")


def _save_video(
    pipe: Pipeline,
    latent: torch.Tensor,
    path: Path,
    settings: Settings,
    record: dict[str, Any],
    progress: Progress,
    earlier: dict[str, float],
) -> int:
    """Decode into the file, in tiles if memory does not suffice for the whole; the number of frames.

    earlier: seconds by stage that are not this video's.
    """

    team = pipe.mesh.team

    def attempt(tiled: bool) -> int:
        with closing(pipe.decode(latent, tiled=tiled)) as chunks:
            if team.first:
                return write(chunks)
            deque(chunks, maxlen=0)  # gives none, but takes this process's part in them
        team.meet()
        return 0

    def write(chunks: Iterable[torch.Tensor]) -> int:
        with VideoWriter(path, pipe.fps) as video:
            with progress.stage("decode", unit="frame"):
                for chunk in chunks:
                    if not chunk.isfinite().all():
                        raise JobError(f"{path}: NaN or Inf in the decoded frames after frame {video.frames}")
                    video.write(chunk)
                    progress.advance(chunk.shape[1])
            team.meet()  # the file appears when nobody has failed
            with progress.stage("save"):
                spent = {name: s - earlier.get(name, 0.0) for name, s in progress.seconds.items()}
                video.finish(completed(record, video, {name: s for name, s in spent.items() if s > 0}))
        return video.frames

    try:
        return team.agree(lambda: attempt(settings.vae_tiling))
    except torch.OutOfMemoryError:
        if settings.vae_tiling:
            raise
    # Out here the failed attempt's tensors are no longer held by the exception.
    progress.say("out of memory in decode: once more, in tiles (--vae_tiling does so from the start)")
    if latent.is_cuda:
        torch.cuda.empty_cache()
    return team.agree(lambda: attempt(True))


def _check_file(settings: Settings, save_file: Path) -> None:
    if save_file.exists() and not settings.overwrite:
        raise InputError(f"--save_file {save_file}: exists already; --overwrite replaces it")
    _check_place(save_file)


def _check_place(save_file: Path) -> None:
    """Before the long work: can a file be made here?"""
    try:
        save_file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save_file.parent).close()
    except OSError as e:
        raise JobError(f"{save_file.parent}: no file can be written there ({e.strerror})") from e


def _keep(save_file: Path, latent: torch.Tensor, record: dict[str, Any], progress: Progress) -> Path | None:
    """Save the latents beside the video to come, or where temporary files go; None, and a warning, if neither works."""
    wanted = _latents_beside(save_file)
    for path in (wanted, Path(tempfile.gettempdir()) / wanted.name):
        try:
            save_latents(path, latent, record)
        except OSError as e:
            progress.say(f"warning: the latents cannot be kept as {path} ({e.strerror})")
        else:
            return path
    return None


def _latents_beside(save_file: Path) -> Path:
    return save_file.with_name(f"{save_file.stem}.latents.safetensors")


def _how_to_finish(settings: Settings, save_file: Path, kept: Path | None, error: BaseException) -> str:
    """What became of the latents, and the command that decodes them: on the CPU if the device had no room for tiles."""
    if kept is None:
        return "and the finished latents could not be kept"
    device = "cpu" if isinstance(error, torch.OutOfMemoryError) else settings.device
    words = ["python", "generate.py", "--task", settings.task, "--ckpt_dir", settings.ckpt_dir]
    words += ["--decode_latents", kept, "--save_file", save_file]
    words += [] if device == "auto" else ["--device", device]
    words += [] if settings.dtype == "auto" else ["--dtype", settings.dtype]
    words += ["--vae_tiling"] if settings.vae_tiling else []
    words += ["--overwrite"] if settings.overwrite else []
    return f"the finished latents are kept; to make the video of them: {shlex.join(map(str, words))}"


def _report(job: Job, error: Exception, progress: Progress, team: Team) -> str:
    """Say that a job failed and why; the sentence comes back for the summary."""
    if told := origin_of(error).traceback:
        progress.say(told)
        if progress.quiet and team.first:  # the summary will not have it
            print(told, file=sys.stderr)
    sentence = "; ".join([f"{job.source}: {_reason(error)}", *getattr(error, "__notes__", [])])
    progress.event("failed", {"index": job.index, "file": str(job.save_file), "reason": sentence})
    progress.say(f"failed: {sentence}")
    return sentence


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        first_line = str(error).partition("\n")[0]
        return f"out of memory on the device ({first_line})"
    return str(error) if isinstance(error, WanError) else f"{type(error).__name__}: {error}"


def _sum_up(run: Run, saved: int, tried: int, failures: list[str], progress: Progress) -> None:
    counts = {
        "saved": saved,
        "there already": len(run.jobs) - tried,
        "failed": len(failures),
        "not tried": tried - saved - len(failures),
    }
    progress.say(progress.table())
    progress.say(", ".join(f"{count} {what}" for what, count in counts.items() if count))
    if len(run.jobs) > 1:
        for sentence in failures:
            progress.say(f"  {sentence}")
