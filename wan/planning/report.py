"""A plan in words and as data: lines for people, JSON for records and `--json`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from wan.cli.options import QUALITIES
from wan.distributed.mesh import divisors
from wan.jobs.job import Job, chains, frames_joined
from wan.modules.quantised_linear import why_unpacked
from wan.planning.plan import Plan, dtype_name, is_absent
from wan.planning.time_estimate import expect, network_of, sent_bytes, sharded_bytes
from wan.utils.accelerator import Accelerator, host_bytes
from wan.utils.errors import InputError
from wan.utils.progress import duration, quantity

MOST_LISTED = 12  # steps, and jobs: of more, the first ones
LONGEST_PROMPT = 60  # characters of it in a line
LEAST_EXPECTED = 10.0  # seconds of a video: of shorter ones most is spent between operations, not in them
STREAMING_BYTES = 10**9  # of the host while weights stream; 0.85 GB measured, the page cache aside

# Bytes per pixel of an mp4, at 832x480: smooth motion 0.013, light grain 0.24, heavy grain 0.71, pure noise 0.97.
BYTES_OF_A_PIXEL = {"needed": 0.25, "least": 0.01, "most": 1.0}
LATENT = 0.25  # bytes of kept latents for each pixel of each frame: 16 float32 channels for 4 x 8 x 8 pixels
RECORD_BYTES = 20_000  # bytes in the mp4 and beside it


class Outlook:
    """A plan on this machine as it is now. Bytes; host memory is what all processes here need together."""

    def __init__(self, plan: Plan, done: Collection[int] = ()) -> None:
        """done: indices of the jobs whose videos exist."""
        self.plan, self.done = plan, frozenset(done)
        self.budget = plan.largest().budget if plan.jobs else None
        self.absent = is_absent(plan.request, plan.device)
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", plan.layout.world)) if plan.layout.world > 1 else 1
        todo = [job for job in plan.jobs if job.index not in self.done]
        self.expected = None if self.absent else expect(plan, todo)
        needed = self.budget.peak if self.budget else None
        if Accelerator(plan.device).has_memory:
            needed = STREAMING_BYTES + (plan.weight_bytes["text encoder"] if plan.text_device.type == "cpu" else 0)
        self.host_needed = needed and needed * self.here
        self.host_available = host_bytes()
        self.disks = disks(todo, latents=plan.request.save_latents)

    def lines(self) -> list[str]:
        """The plan as printed before the run starts."""
        warnings = [f"warning: {text}" for text in self.plan.warnings]
        return [*_settings(self.plan), *self._memory(), *process_lines(self.plan), *self._jobs(), *warnings]

    def as_dict(self) -> dict[str, Any]:
        """The plan for `--json`: unlike a record of it, with this machine's state."""
        whole = as_dict(self.plan)
        whole["jobs"] = [{**job, "done": job["index"] in self.done} for job in whole["jobs"]]
        return whole | {
            "expected": self.expected,
            "host": {"needed": self.host_needed, "available": self.host_available},
            "disk": self.disks,
        }

    def _memory(self) -> list[str]:
        plan, budget, host = self.plan, self.budget, quantity(self.host_available, "B")
        lines = [budget.line("GPU" if self.absent else str(plan.device))] if budget and plan.room is not None else []
        if plan.jobs and Accelerator(plan.device).has_memory:
            lines.append(f"host memory: about {quantity(self.host_needed or 0, 'B')} of {host} available")
        elif budget and plan.room is None:
            each = f", for each of {self.here} processes" if self.here > 1 else ""
            peaks = ", ".join(f"{stage} {quantity(size, 'B')}" for stage, size in budget.peaks.items())
            lines.append(f"host memory {host} available; peaks{each}: {peaks}")
            if self.host_needed and self.host_needed > self.host_available:
                lines.append("warning: not enough memory; use --vram GB to stream weights from disk")
        for disk in self.disks:
            needed, least, most = (quantity(disk[name], "B") for name in BYTES_OF_A_PIXEL)
            free = "free space unknown" if disk["free"] is None else f"{quantity(disk['free'], 'B')} free"
            lines.append(f"disk: about {needed} to write in {disk['folder']} ({least} to {most}, by content), {free}")
            if disk["free"] is not None and disk["needed"] > disk["free"]:
                lines.append(
                    f"warning: {disk['folder']} may be full before the last video; what does not fit fails alone"
                )
        return lines

    def _jobs(self) -> list[str]:
        jobs, videos, done, lines = self.plan.jobs, len(self.plan.jobs), len(self.done), []
        shown = jobs[: MOST_LISTED if videos > MOST_LISTED + 1 else None]
        for job in shown:
            prompt = " ".join(job.prompt.split())
            prompt = prompt if len(prompt) <= LONGEST_PROMPT else f"{prompt[: LONGEST_PROMPT - 3].rstrip()}..."
            video, steps = self.plan.video(job), len(self.plan.of(job).steps)
            tokens = (f"{len(video.windows)} windows of " if video.windows else "") + f"{video.tokens:,}"
            made_from = job.picture + (f", from step {video.first_step + 1} of {steps} on" if video.first_step else "")
            size = f"{job.size[0]}x{job.size[1]}" + (f" (from {made_from})" if made_from else "")
            size += f", {job.frame_num} frames, {tokens} tokens, seed {job.seed}"
            mark = " (done)" if job.index in self.done else ""
            lines.append(f"job {job.number}{mark}: {prompt}: {size} -> {job.save_file}")
        if rest := jobs[len(shown) :]:
            lines.append(f"... and {len(rest):,} more, the last one {rest[-1].save_file}")
        for chain in chains(jobs):
            if joined := chain[0].joined:
                numbers = ", ".join(job.number for job in chain)
                lines.append(f"jobs {numbers} joined, {frames_joined(chain)} frames -> {joined}")
        if done:
            lines.append(f"{done:,} of {quantity(videos, 'video')} done already")
        if done == videos or self.absent:
            return lines
        if (expected := self.expected) is None:
            return [*lines, "expected time: unknown (python -m wan.doctor measures it)"]
        if sum(expected["stages"].values()) < LEAST_EXPECTED:
            return [*lines, "expected time: seconds for each video, too small to estimate by the measured rates"]
        stages = ", ".join(f"{name} {duration(spent)}" for name, spent in expected["stages"].items())
        whole = f"; {videos - done:,} videos {duration(expected['whole'])}" if videos - done > 1 else ""
        without = "" if expected["communication"] else ", without communication"
        return [*lines, f"expected time, by the rates that wan.doctor measured here{without}: {stages}{whole}"]


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, for records: all that does not depend on the machine's state."""
    sampling = plan.sampling
    budget = plan.largest().budget if plan.jobs else None
    return {
        "task": plan.request.task, "solver": sampling.solver if sampling else None,
        "shift": sampling.shift if sampling else None, "preset": plan.preset,
        "steps": [asdict(step) for step in plan.steps],
        "loras": {expert: [lora.as_dict() for lora in loras] for expert, loras in plan.coverage.items()},
        "fingerprints": plan.fingerprints,
        "device": str(plan.device), "dtype": dtype_name(plan.dtype), "attention": plan.attention,
        "layout": str(plan.layout), "weight_bytes": plan.weight_bytes, "peak_bytes": budget.peaks if budget else None,
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


def _settings(plan: Plan) -> list[str]:
    request, sampling, lines = next(iter(plan.variants.values()), plan).request, plan.sampling, []
    if sampling is not None:
        preset = f", settings of {plan.preset}" if plan.preset else ""
        count, where = quantity(len(plan.steps), "step"), request.ckpt_dir or "files"
        lines.append(f"{request.task} from {where}, {sampling.solver}, shift {sampling.shift:g}, {count}{preset}")
        steps = [f"step {number} {step}" for number, step in enumerate(plan.steps, 1)]
        if len(steps) > MOST_LISTED:  # one entry for each run of steps that differ in their time alone
            groups = groupby(enumerate(plan.steps, 1), lambda numbered: replace(numbered[1], timestep=0.0))
            runs = [(run[0], run[-1]) for _, group in groups for run in [list(group)]]
            steps = [f"steps {first} to {last} t={start.timestep:.1f} to {end}" for (first, start), (last, end) in runs]
        lines.append(" | ".join(steps))
    if options := QUALITIES[request.quality]:
        lines.append(f"quality {request.quality}: {', '.join(f'--{n} {getattr(request, n)}' for n in options)}")
    lines += [f"LoRA {name}: {lora.path}: {lora.summary()}" for name, found in plan.coverage.items() for lora in found]
    for part, path in plan.checkpoint.files.items():
        lines.append(f"{'expert ' if part in plan.config.experts else ''}{part.replace('_', ' ')}: {path}")
    extra = ""
    if request.quantize != "none":
        reason = why_unpacked(request.quantize, plan.device, plan.dtype)
        extra = f", weights of inner blocks in {request.quantize}, "
        extra += f"unpacked for each product ({reason})" if reason else f"multiplied in {request.quantize}"
    extra += ", decode in bf16" if request.vae_dtype == "bf16" else ""
    extra += f", step cache {request.cache:g} (times are for all steps)" if request.cache else ""
    extra += f", NAG {request.nag} (in each block a second attention to text)" if request.guide[0] != 1 else ""
    lines.append(f"{plan.device}, {dtype_name(plan.dtype)}, attention {plan.attention}{extra}")
    if plan.variants:
        plans = list(plan.variants.values())
        again = sum(now.lora_stacks() != then.lora_stacks() for then, now in pairwise(plans))
        cost = "the weights are read once"
        if again and plan.lora_mode == "merge":
            cost = f"the experts are read again {again} times, to merge other LoRAs"
        if anew := sum(now.networks() != then.networks() for then, now in pairwise(plans)):
            cost = f"all networks are loaded anew {anew} times"
        lines.append(f"{len(plans)} settings in turn, first those above; {cost}")
    sizes = " + ".join(f"{name} {quantity(size, 'B')}" for name, size in plan.weight_bytes.items())
    return [*lines, f"size of the weights: {sizes}"]


def process_lines(plan: Plan) -> list[str]:
    """How several processes divide the work, and what that costs."""
    layout, request, groups, each = plan.layout, plan.request, plan.layout.data, plan.layout.sequence
    if layout.world == 1 or not plan.jobs:
        return []
    shared = [f"{name} expert" for name in plan.checkpoint.experts] if request.dit_fsdp else []
    shared += ["text encoder"] if request.t5_fsdp else []
    weights = {name: size // (each if name in shared else 1) for name, size in plan.weight_bytes.items()}
    held = " + ".join(f"{name} {quantity(size, 'B')}" for name, size in weights.items())
    at_once = f"{groups} videos at a time" if groups > 1 else "one video at a time"
    lines = [f"{layout}: {at_once}, {each} process{'es' if each > 1 else ''} each; weights in each: {held}"]
    network = network_of(plan)
    sent = sent_bytes(layout, network, plan.largest().tokens, plan.dtype.itemsize, sharded_bytes(plan))
    if parts := " + ".join(f"{purpose} {quantity(size, 'B')}" for purpose, size in sent.items() if size):
        lines.append(f"a forward sends from each: {parts}")
    if len(plan.jobs) < groups:
        legal = [n for n in divisors(layout.world // layout.ring) if network.num_heads % n == 0]
        hint = f"; --ulysses_size {legal[-1]} puts more of them on one video" if legal[-1] > layout.ulysses else ""
        videos = quantity(len(plan.jobs), "video")
        lines.append(f"warning: {videos} for {groups} groups: some have nothing to do{hint}")
    return lines


def disks(jobs: Sequence[Job], *, latents: bool) -> list[dict[str, Any]]:
    """Bytes that `jobs` need, by file system: an estimate, its spread, and what is free (None: it does not say).
    latents: they are kept for good."""
    groups: dict[int, tuple[Path, list[Job]]] = {}
    for parent, there in groupby(jobs, lambda job: job.save_file.parent):
        folder = next(path for path in (parent.absolute(), *parent.absolute().parents) if path.exists())
        groups.setdefault(folder.stat().st_dev, (folder, []))[1].extend(there)
    found = []
    for folder, here in groups.values():
        pixels = [job.frame_num * job.size[0] * job.size[1] for job in here]
        joined = sum(size for job, size in zip(here, pixels, strict=True) if job.joined)
        videos = sum(pixels) + joined + max(pixels)  # one file at a time is there twice, while it is completed
        beside = RECORD_BYTES * len(here) + LATENT * (sum(pixels) if latents else max(pixels))
        spread = {name: rate * videos + beside for name, rate in BYTES_OF_A_PIXEL.items()}
        usage = shutil.disk_usage(folder)
        found.append({"folder": str(folder), **spread, "free": usage.free if usage.total else None})
    return found


def check_disks(found: Sequence[dict[str, Any]]) -> None:
    """InputError where the videos cannot fit, whatever they show."""
    if full := [disk for disk in found if disk["free"] is not None and disk["least"] > disk["free"]]:
        raise InputError(
            f"--save_dir: {quantity(disk['free'], 'B')} free in {disk['folder']}, the videos need at least "
            f"{quantity(disk['least'], 'B')}; free some, or make what fits with --ignore_disk"
            for disk in full
        )
