"""What is said of a plan: lines for people, plain data for records and `--json`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wan.jobs.chains import chains, frames_joined
from wan.jobs.job import Job
from wan.jobs.output_paths import written_bytes
from wan.modules.fp8 import why_unpacked
from wan.offload.budget import Budget
from wan.planning.communication import plan_lines
from wan.planning.plan import Plan, dtype_name, is_absent
from wan.planning.time_estimate import Expected, expect, network_of, sharded_bytes
from wan.sampling import Step
from wan.utils.accelerator import Accelerator, host_bytes
from wan.utils.progress import duration, quantity

MOST_STEPS_SHOWN = 12
MOST_JOBS_SHOWN = 12  # of more, the first ones
LONGEST_PROMPT = 60  # characters of it in a line
STREAMING_BYTES = 10**9  # of the host while weights stream; 0.85 GB measured, the page cache aside


@dataclass(frozen=True)
class Outlook:
    """A plan on this machine as it is now. Bytes; of the host what all processes here need together.

    done: the numbers of the jobs whose videos are there. disk: by folder, what may be written at most and what is free.
    """

    plan: Plan
    done: frozenset[int]
    budget: Budget | None
    expected: Expected | None
    host_needed: int | None
    host_available: int
    disk: dict[Path, tuple[float, int]]

    @classmethod
    def of(cls, plan: Plan, done: Collection[int] = ()) -> Outlook:
        budget = plan.largest().budget if plan.jobs else None
        needed: int | None = _streaming_bytes(plan)
        if not Accelerator(plan.device).has_memory:
            needed = budget.peak if budget else None
        absent = is_absent(plan.request, plan.device)
        return cls(
            plan,
            frozenset(done),
            budget,
            None if absent else expect(plan, [job for job in plan.jobs if job.index not in done]),
            needed and needed * _processes_here(plan),
            host_bytes(),
            {folder: (size, shutil.disk_usage(folder).free) for folder, size in written_bytes(plan.jobs).items()},
        )

    def lines(self) -> list[str]:
        """The plan as printed before the run starts."""
        told = [*_what_lines(self.plan), *self._memory_lines(), *_process_lines(self.plan), *self._job_lines()]
        return told + [f"warning: {text}" for text in self.plan.warnings]

    def as_dict(self) -> dict[str, Any]:
        """The plan as `--json` tells it: with what a record of it does not keep, this machine's state."""
        whole, expected = as_dict(self.plan), self.expected
        whole["jobs"] = [{**job, "done": job["index"] in self.done} for job in whole["jobs"]]
        return whole | {
            "expected": expected and {
                "stages": expected.stages, "whole": expected.whole, "communication": expected.communication,
            },
            "host": {"needed": self.host_needed, "available": self.host_available},
            "disk": [
                {"folder": str(folder), "needed": needed, "free": free} for folder, (needed, free) in self.disk.items()
            ],
        }  # fmt: skip

    def _memory_lines(self) -> list[str]:
        """What fits on the device, in the host's memory and on the disk."""
        plan, budget, host = self.plan, self.budget, quantity(self.host_available, "B")
        if not plan.jobs:
            return []
        here = _processes_here(plan)
        each = f", for each of {here} processes" if here > 1 else ""
        name = "GPU" if is_absent(plan.request, plan.device) else str(plan.device)
        told = [budget.line(name)] if budget and plan.room is not None else []
        if Accelerator(plan.device).has_memory:
            told.append(f"host memory: about {quantity(self.host_needed or 0, 'B')} of {host} available")
        elif budget and plan.room is None:
            peaks = ", ".join(f"{stage} {quantity(size, 'B')}" for stage, size in budget.peaks.items())
            told.append(f"host memory {host} available; peaks{each}: {peaks}")
            if self.host_needed and self.host_needed > self.host_available:
                told.append("warning: not enough memory; use --vram GB to stream weights from disk")
        for folder, (size, free) in self.disk.items():
            there = f" in {folder}" if len(self.disk) > 1 else ""
            told.append(f"disk: at most {quantity(size, 'B')} to write{there}, {quantity(free, 'B')} free")
        return told

    def _job_lines(self) -> list[str]:
        """The jobs, of many the first ones; how many are done; how long the others will take."""
        plan, done = self.plan, self.done
        shown = plan.jobs[: MOST_JOBS_SHOWN if len(plan.jobs) > MOST_JOBS_SHOWN + 1 else None]
        told = [_job_line(plan, job, job.index in done) for job in shown]
        if rest := plan.jobs[len(shown) :]:
            told.append(f"... and {len(rest):,} more, the last one {rest[-1].save_file}")
        for chain in chains(plan.jobs):
            if joined := chain[0].joined:
                numbers = ", ".join(job.number for job in chain)
                told.append(f"jobs {numbers} joined, {frames_joined(chain)} frames -> {joined}")
        if done:
            told.append(_done_line(len(plan.jobs), len(done)))
        return told + self._time_lines(len(plan.jobs) - len(done))

    def _time_lines(self, todo: int) -> list[str]:
        """Seconds to expect, if rates were measured here."""
        expected = self.expected
        if not todo or is_absent(self.plan.request, self.plan.device):
            return []
        if expected is None:
            return ["expected time: unknown (python -m wan.doctor measures it)"]
        stages = ", ".join(f"{name} {duration(spent)}" for name, spent in expected.stages.items())
        videos = f"; {todo:,} videos {duration(expected.whole)}" if todo > 1 else ""
        without = "" if expected.communication else ", without communication"
        return [f"expected time, by the rates that wan.doctor measured here{without}: {stages}{videos}"]


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON takes it, for records: what does not hang on the machine's state."""
    sampling = plan.sampling
    budget = plan.largest().budget if plan.jobs else None
    return {
        "task": plan.request.task,
        "solver": sampling.solver if sampling else None,
        "shift": sampling.shift if sampling else None,
        "preset": plan.preset,
        "steps": [asdict(step) for step in plan.steps],
        "loras": {expert: [lora.as_dict() for lora in loras] for expert, loras in plan.coverage.items()},
        "fingerprints": plan.fingerprints,
        "device": str(plan.device),
        "dtype": dtype_name(plan.dtype),
        "attention": plan.attention,
        "layout": str(plan.layout),
        "weight_bytes": plan.weight_bytes,
        "peak_bytes": budget.peaks if budget else None,
        "jobs": [
            {
                "index": job.index, "prompt": job.prompt, "size": list(job.size), "image": job.picture or None,
                "frames": job.frame_num, "tokens": plan.video(job).tokens, "seed": job.seed,
                "save_file": str(job.save_file), "joined": job.joined and str(job.joined),
            }
            for job in plan.jobs
        ],
        "warnings": list(plan.warnings),
    }  # fmt: skip


def _what_lines(plan: Plan) -> list[str]:
    """What is sampled how, with which weights, where."""
    request, sampling, told = plan.request, plan.sampling, []
    if sampling is not None:
        preset = f", settings of {plan.preset}" if plan.preset else ""
        steps = f"{len(plan.steps)} step{'s' if len(plan.steps) > 1 else ''}"
        told.append(
            f"{request.task} from {request.ckpt_dir or 'files'}, {sampling.solver}, shift {sampling.shift:g}, "
            f"{steps}{preset}"
        )
        told.append(" | ".join(_step_lines(plan.steps)))
    for expert, loras in plan.coverage.items():
        told += [f"LoRA {expert}: {lora.path}: {lora.summary()}" for lora in loras]
    for part, path in plan.checkpoint.files.items():
        told.append(f"{'expert ' if part in plan.config.experts else ''}{part.replace('_', ' ')}: {path}")
    decoding = ", decode in bf16" if request.vae_dtype == "bf16" else ""
    told.append(f"{plan.device}, {dtype_name(plan.dtype)}, attention {plan.attention}{_quantised(plan)}{decoding}")
    parts = " + ".join(f"{name} {quantity(size, 'B')}" for name, size in plan.weight_bytes.items())
    return [*told, f"size of the weights: {parts}"]


def _streaming_bytes(plan: Plan) -> int:
    """Of the host, in each process, where the transformer is on another device."""
    return STREAMING_BYTES + (plan.weight_bytes["text encoder"] if plan.text_device.type == "cpu" else 0)


def _processes_here(plan: Plan) -> int:
    """Of the run's processes those on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", plan.layout.world)) if plan.layout.world > 1 else 1


def _quantised(plan: Plan) -> str:
    if plan.request.quantize == "none":
        return ""
    reason = why_unpacked(plan.device, plan.dtype)
    how = f"unpacked for each product ({reason})" if reason else "multiplied in fp8"
    return f", weights of inner blocks in fp8, {how}"


def _job_line(plan: Plan, job: Job, done: bool) -> str:
    size = f"{job.size[0]}x{job.size[1]}" + (f" (from {job.picture})" if job.picture else "")
    extent = f"{size}, {job.frame_num} frames, {plan.video(job).tokens:,} tokens"
    prompt = " ".join(job.prompt.split())
    prompt = prompt if len(prompt) <= LONGEST_PROMPT else f"{prompt[: LONGEST_PROMPT - 3].rstrip()}..."
    mark = " (done)" if done else ""
    return f"job {job.number}{mark}: {prompt}: {extent}, seed {job.seed} -> {job.save_file}"


def _done_line(videos: int, done: int) -> str:
    if done == videos:
        return "the video is done already" if videos == 1 else f"all {videos:,} videos are done already"
    return f"{videos:,} videos, of which {done:,} {'is' if done == 1 else 'are'} done already"


def _process_lines(plan: Plan) -> list[str]:
    """How several processes divide the work, and what that costs."""
    layout, request = plan.layout, plan.request
    if layout.world == 1 or not plan.jobs:
        return []
    experts = [f"{name} expert" for name in plan.checkpoint.experts]
    sharded = (experts if request.dit_fsdp else []) + (["text encoder"] if request.t5_fsdp else [])
    sizes = plan.weight_bytes.items()
    return plan_lines(
        layout,
        network_of(plan),
        tokens=plan.largest().tokens,
        jobs=len(plan.jobs),
        element_bytes=plan.dtype.itemsize,
        weights={name: size // layout.sequence if name in sharded else size for name, size in sizes},
        sharded_bytes=sharded_bytes(plan),
    )


def _step_lines(steps: tuple[Step, ...]) -> list[str]:
    """`step 1 t=1000.0 high cfg 1`; of a long plan, one entry for each run of steps that differ in their time alone."""
    if len(steps) <= MOST_STEPS_SHOWN:
        return [f"step {number} {step}" for number, step in enumerate(steps, 1)]
    told, first = [], 0
    for last, step in enumerate(steps):
        after = steps[last + 1] if last + 1 < len(steps) else None
        if after is None or replace(after, timestep=step.timestep) != step:
            told.append(f"steps {first + 1} to {last + 1} t={steps[first].timestep:.1f} to {step}")
            first = last + 1
    return told
