"""`wan.open(...)`: a task's networks stay loaded for one video after another, with every option of the command line.
Shapes: C latent channels, f, h, w latent frames, rows, columns; F, H, W those of the video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.cli.options import OPTIONS, path, paths, read_all, text
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.media.video import VideoWriter
from wan.pipeline import FINER, Pipeline, retry_smaller
from wan.planning.build import make_plan
from wan.planning.plan import Plan
from wan.runner.batch import open_pipeline
from wan.runner.record import describe, outcome
from wan.sampling import OnStep, Schedule, plan_steps
from wan.utils.accelerator import Accelerator
from wan.utils.errors import InputError
from wan.utils.progress import Progress


@dataclass(frozen=True)
class Generation:
    """A video float32 [3, F, H, W] in [-1, 1], its latent float32 [C, f, h, w], and its record as in a .json file."""

    video: Tensor
    latent: Tensor
    record: Mapping[str, Any]
    fps: float

    def save(self, file: str | Path) -> None:
        """Write the H.264 file that the command line writes, with the record in it and beside it."""
        with VideoWriter(Path(file), self.fps) as writer:
            writer.write(self.video)
            writer.finish({**self.record, **outcome(writer.path, writer.frames, writer.size or (0, 0), self.fps)})


class Session:
    """One task's networks, and the plan that they follow now."""

    def __init__(
        self, task: str, ckpt_dir: str | Path | None = None, *, progress: Progress | None = None, **options: object
    ) -> None:
        """options: of the command line, by name; they hold for every video, unless `generate` is given others.
        Nothing is loaded yet. InputError for an option that does not exist or cannot be read."""
        self.progress, self.runtime = progress or Progress(quiet=True), Runtime()
        self.pipe: Pipeline | None = None
        self._values = _read({"task": task, "ckpt_dir": ckpt_dir and str(ckpt_dir), **options})

    def plan(self, prompt: str, **options: object) -> Plan:
        """The plan of one video, from headers alone. InputError with all problems."""
        outcome = resolve({**self._values, **_read({"prompt": prompt, **options})})
        if not isinstance(outcome, Generate) or len(outcome.jobs) != 1:
            raise InputError("only one video is made at a time: leave out options that make several, or none")
        return make_plan(outcome, self.runtime)

    def generate(
        self,
        prompt: str,
        *,
        on_step: OnStep = lambda *_: None,
        noise: Tensor | None = None,
        schedule: Schedule | None = None,
        **options: object,
    ) -> Generation:
        """Make one video; only the weights that these options change are read again. InputError, JobError.
        on_step: see `wan.sampling.OnStep`. noise: float32 [C, f, h, w] to start from, instead of the seed's.
        schedule: a solver with its timesteps, instead of --sample_solver and what belongs to it."""
        plan = self.plan(prompt, **options)
        if schedule is not None:
            assert plan.sampling is not None, "a plan with a video has a sampling"
            if plan.jobs[0].video:
                raise InputError("schedule: a video made from another one follows the planned solver; leave it out")
            steps = plan_steps(schedule.timesteps, plan.sampling, plan.config.boundary)
            sampling = replace(plan.sampling, solver=type(schedule).__name__)
            plan = replace(plan, sampling=sampling, steps=tuple(steps))
        self.pipe = pipe = self.pipe or open_pipeline(plan, self.progress, self.runtime)
        pipe.follow(plan)
        job, before = plan.jobs[0], dict(self.progress.seconds)
        with Accelerator(plan.device).current():  # the caller's thread may be another one than before
            pipe.encode(plan.texts(job))
            pipe.release_text_encoder()
            latent = pipe.sample_job(job, on_step, noise=noise, schedule=schedule)
            video = self.decode(latent)
        spent = {name: round(whole - before.get(name, 0.0), 3) for name, whole in self.progress.seconds.items()}
        record = {**describe(plan, job, pipe.info()), **pipe.computed(), "seconds": spent}
        return Generation(video, latent, record, plan.config.sample_fps)

    def decode(self, latent: Tensor) -> Tensor:
        """[C, f, h, w] -> float32 [3, F, H, W] in [-1, 1], by the VAE of the last video."""
        if (pipe := self.pipe) is None:
            raise InputError("a session decodes once it has made a video")
        return retry_smaller(self.progress, FINER, lambda finer: torch.cat([*pipe.decode(latent, finer=finer)], dim=1))


def _read(values: Mapping[str, object]) -> dict[str, Any]:
    problems: list[str] = []
    found = read_all({name: _spelled(name, value) for name, value in values.items()}, problems)
    if problems:
        raise InputError(problems)
    return found


def _spelled(name: str, value: object) -> object:
    """`value` as the command line takes it: numbers, pairs, sizes and paths as text where the option is one."""
    takes = OPTIONS[name].read if name in OPTIONS else None
    if takes is paths:
        return [value] if isinstance(value, str) else value
    if isinstance(value, tuple | list):
        return ("*" if name == "size" else ",").join(map(str, value))
    return str(value) if takes in (text, path) and isinstance(value, int | float | Path) else value
