"""What is said of a plan: lines for people, plain data for records and `--json`."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from wan.device import host_bytes
from wan.distributed.cost import plan_lines
from wan.expected import Seconds, kept_rates, network_of, seconds
from wan.loading.budget import Budget
from wan.modules.fp8 import why_unpacked
from wan.plan import Plan, dtype_name, written_bytes
from wan.request.chains import chains, frames_joined
from wan.request.settings import Job
from wan.sampling import Step
from wan.utils.progress import duration, quantity

MOST_STEPS_SHOWN = 12
MOST_JOBS_SHOWN = 12  # of more, the first ones
LONGEST_PROMPT = 60  # characters of it in a line
UNLIMITED = 1 << 60
STREAMING_BYTES = 1e9  # of the host while weights stream; 0.85 GB measured, the page cache aside


def lines(plan: Plan, done: Collection[int] = ()) -> list[str]:
    """The plan as printed before the run starts. done: the numbers of the jobs whose videos are there."""
    request, sampling = plan.request, plan.sampling
    told = []
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
    told.append(f"weights in memory: {parts}")
    told += _memory_lines(plan)
    told += _process_lines(plan)
    told += _job_lines(plan, done)
    return told + [f"warning: {text}" for text in plan.warnings]


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON takes it, for records and `--json`."""
    sampling = plan.sampling
    budget = _budget(plan) if plan.jobs else None
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
                "frames": job.frame_num, "tokens": plan.tokens(job.size, job.frame_num), "seed": job.seed,
                "save_file": str(job.save_file), "joined": job.joined and str(job.joined),
            }
            for job in plan.jobs
        ],
        "warnings": list(plan.warnings),
    }  # fmt: skip


def _quantised(plan: Plan) -> str:
    if plan.request.quantize == "none":
        return ""
    reason = why_unpacked(plan.device, plan.dtype)
    how = f"unpacked for each product ({reason})" if reason else "multiplied in fp8"
    return f", weights of inner blocks in fp8, {how}"


def _budget(plan: Plan) -> Budget | None:
    """How the largest job uses the device; on a CPU without a limit, what it needs of the host."""
    largest = plan.largest()
    if plan.room is None and plan.device.type == "cpu":
        plan = replace(plan, room=UNLIMITED, offload=False)
    return plan.budget(largest.size, largest.frame_num, plan.prompts())


def _memory_lines(plan: Plan) -> list[str]:
    """What fits on the device, in the host's memory and on the disk."""
    if not plan.jobs:
        return []
    told, budget, host = [], _budget(plan), host_bytes()
    if budget and plan.room is not None:
        told.append(budget.line(str(plan.device)))
    elif budget:
        peaks = ", ".join(f"{stage} {size / 1e9:.1f}" for stage, size in budget.peaks.items())
        told.append(f"host memory {quantity(host, 'B')} available; peaks in GB: {peaks}")
        if budget.peak > host:
            told.append(
                "warning: that is more than there is; --vram GB holds a part and reads the rest when it is needed"
            )
    if plan.device.type != "cpu":
        text = plan.weight_bytes["text encoder"] if plan.text_device.type == "cpu" else 0
        told.append(f"host memory: about {quantity(STREAMING_BYTES + text, 'B')} of {quantity(host, 'B')} available")
    for folder, size in written_bytes(plan.jobs).items():
        told.append(
            f"disk: at most {quantity(size, 'B')} to write, {quantity(shutil.disk_usage(folder).free, 'B')} free"
        )
    return told


def _job_lines(plan: Plan, done: Collection[int]) -> list[str]:
    """The jobs, of many the first ones; how many are done; how long the others will take."""
    shown = plan.jobs[: MOST_JOBS_SHOWN if len(plan.jobs) > MOST_JOBS_SHOWN + 1 else None]
    told = [_job_line(plan, job, job.index in done) for job in shown]
    if rest := plan.jobs[len(shown) :]:
        told.append(f"... and {len(rest):,} more, the last one {rest[-1].save_file}")
    for chain in chains(plan.jobs):
        if joined := chain[0].joined:
            numbers = ", ".join(str(job.index + 1) for job in chain)
            told.append(f"jobs {numbers} joined, {frames_joined(chain)} frames -> {joined}")
    if done:
        told.append(f"{len(plan.jobs)} videos, of which {len(done)} {'is' if len(done) == 1 else 'are'} done already")
    return told + _time_lines(plan, [job for job in plan.jobs if job.index not in done])


def _job_line(plan: Plan, job: Job, done: bool) -> str:
    size = f"{job.size[0]}x{job.size[1]}" + (f" (from {job.picture})" if job.picture else "")
    extent = f"{size}, {job.frame_num} frames, {plan.tokens(job.size, job.frame_num):,} tokens"
    prompt = " ".join(job.prompt.split())
    prompt = prompt if len(prompt) <= LONGEST_PROMPT else f"{prompt[: LONGEST_PROMPT - 3].rstrip()}..."
    mark = " (done)" if done else ""
    return f"job {job.index + 1}{mark}: {prompt}: {extent}, seed {job.seed} -> {job.save_file}"


def _time_lines(plan: Plan, todo: Sequence[Job]) -> list[str]:
    """Seconds to expect, if rates were measured here; all processes of a layout but one are taken to cost nothing."""
    if not todo:
        return []
    rates = kept_rates(plan.device) if plan.layout.world == 1 else None
    if rates is None:
        why = "several processes are not estimated" if plan.layout.world > 1 else "python -m wan.doctor measures it"
        return [f"expected time: unknown ({why})"]
    found: dict[tuple[tuple[int, int], int], Seconds] = {}
    for size, frames in dict.fromkeys((job.size, job.frame_num) for job in todo):
        found[size, frames] = seconds(plan, plan.budget(size, frames, plan.prompts()), size, frames, rates)
    counts = Counter((job.size, job.frame_num) for job in todo)
    longest = max(found.values(), key=lambda one: one.first)
    whole = sum(found[shape].next * count for shape, count in counts.items()) + longest.first - longest.next
    parts = {"text": longest.text, "image": longest.image, "denoise": longest.denoise, "decode": longest.decode}
    stages = ", ".join(f"{name} {duration(spent)}" for name, spent in parts.items() if spent)
    videos = f"; {len(todo):,} videos {duration(whole)}" if len(todo) > 1 else ""
    return [f"expected time, by the rates that wan.doctor measured here: {stages}{videos}"]


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
        tokens=plan.tokens(plan.largest().size, plan.largest().frame_num),
        jobs=len(plan.jobs),
        element_bytes=plan.dtype.itemsize,
        weights={name: size // layout.sequence if name in sharded else size for name, size in sizes},
        sharded_bytes=max(plan.weight_bytes[name] for name in experts) if request.dit_fsdp else 0,
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
