"""What to expect: for each task and size that was trained, what fits, how the weights are held, and seconds.

Seconds are estimates (`wan.planning.time_estimate`) from the rates just measured on this machine, which are kept for
the plans of later runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lightning.releases import RELEASES
from wan.checkpoints.checkpoint import OpenCheckpoint, Part
from wan.checkpoints.safetensors_file import TensorStore
from wan.cli.checks import Check
from wan.cli.options import Request
from wan.configs import TASKS
from wan.distributed.mesh import Layout
from wan.doctor.findings import GOOD, SKIPPED, WRONG, Machine, Outcome, table
from wan.jobs.job import Weights
from wan.jobs.weights import choose_sampling
from wan.modules.released import released_text_encoder, released_transformer, released_vae
from wan.offload.budget import Budget
from wan.planning.memory import plan_video
from wan.planning.plan import Plan
from wan.planning.time_estimate import NEEDED, keep_rates, seconds
from wan.sampling import make_schedule, plan_steps
from wan.utils.accelerator import Accelerator
from wan.utils.progress import duration, quantity


@dataclass(frozen=True)
class Estimate:
    """One row. Bytes and seconds; the seconds of a stage are the longer of computing and reading what it needs.

    mode: how the weights are held. tiles: in which a frame is decoded. advice: what would make it fit, empty if it
    does. vram: GB to ask for on a CPU, where blocks stream only on demand. first: the first video. next: a further one
    of the same run.
    """

    task: str
    size: str
    frames: int
    steps: int
    forwards: int
    fits: bool
    advice: str
    mode: str
    vram: int | None
    tiles: tuple[int, int]
    peak: int
    read: int
    text: float
    denoise: float
    decode: float
    first: float
    next: float

    def row(self) -> list[str]:
        """What a terminal of 80 columns has room for."""
        tiles = "-" if self.tiles == (1, 1) else "x".join(map(str, self.tiles))
        told = [self.task, f"{self.size}x{self.frames}", str(self.steps)]
        if not self.fits:
            return [*told, f"needs {quantity(self.peak, 'B')}", tiles, "does not fit", "-"]
        return [*told, self.mode, tiles, duration(self.first), duration(self.next)]


HEADING = ["task", "video", "steps", "weights", "tiles", "first video", "next"]
ALL, ONE = "all stay", "one at a time"


def forecast(machine: Machine) -> Outcome:
    """The table, as lines under its sentence."""
    missing = [name for name in NEEDED if name not in machine.rates]
    if missing:
        return Outcome(SKIPPED, f"not measured: {', '.join(missing)}")
    if not machine.small:
        with suppress(OSError, RuntimeError):  # no home, or a full one: plans do without
            keep_rates(machine.device, machine.rates)
    room = Accelerator(machine.device).free_bytes
    estimates = [
        estimate
        for task in TASKS
        for distilled in ([True, False] if _is_distilled(task) else [False])
        for estimate in _of_task(task, distilled, room, machine)
    ]
    values = {"estimates": [asdict(estimate) for estimate in estimates], "room": room}
    where = "the device" if Accelerator(machine.device).has_memory else "the host's memory"
    sentence = f"with {quantity(room, 'B')} of {where}, in {machine.usual} (all seconds are estimates)"
    sentence = sentence.replace("torch.", "")
    lines = [*table([HEADING, *(estimate.row() for estimate in estimates)]), *notes(estimates)]
    if not any(estimate.fits for estimate in estimates):
        told = "\n  ".join([f"{sentence}: nothing fits", *lines])
        return Outcome(WRONG, told, "free memory of the device", values)
    return Outcome(GOOD, "\n  ".join([sentence, *lines]), values=values)


def notes(estimates: Sequence[Estimate]) -> list[str]:
    """What the rows that are there need said below them, a line each."""
    fitting = [estimate for estimate in estimates if estimate.fits]
    vram = next((estimate.vram for estimate in fitting if estimate.vram), None)
    told = {
        "few steps: with few-step weights; many: the released ones alone, with guidance": True,
        f"{ONE}: the expert at work stays, then the other one takes its place": any(
            estimate.mode == ONE for estimate in fitting
        ),
        "N of M stay: of an expert's M parts; the others are read when they are needed": any(
            estimate.mode not in (ALL, ONE) for estimate in fitting
        ),
        f"not all stay: with --vram {vram}, which has to be asked for on a CPU": vram is not None,
        "tiles: a frame is decoded in so many pieces": any(estimate.tiles != (1, 1) for estimate in estimates),
        "next: each further video of the same run": bool(fitting),
    }
    helps: dict[str, list[str]] = {}
    for estimate in estimates:
        place = f"{estimate.task} {estimate.size}"
        if not estimate.fits and place not in helps.setdefault(estimate.advice, []):
            helps[estimate.advice].append(place)
    return [
        *(note for note, needed in told.items() if needed),
        *(f"does not fit: {advice} ({', '.join(places)})" for advice, places in helps.items()),
        "each stage's seconds, the peak and the bytes to read: --json",
    ]


def _is_distilled(task: str) -> bool:
    """Whether few-step weights that run here were published for it."""
    return any(task in r.tasks and r.kind != "recipe" and not r.refused for r in RELEASES)


def _of_task(task: str, distilled: bool, room: int, machine: Machine) -> list[Estimate]:
    """A row for each shape of frame; portrait costs what landscape does."""
    plan = released_plan(task, distilled, room, machine)
    sizes = [(int(w), int(h)) for w, h in (text.split("*") for text in plan.config.sizes)]
    return [_estimate(plan, size, machine) for size in sizes if size[0] > size[1]]


def released_plan(task: str, distilled: bool, room: int, machine: Machine) -> Plan:
    """The plan of the task's released checkpoint, which need not be here; `distilled` with few-step weights."""
    config, device, dtype = TASKS[task], machine.device, machine.usual
    request, nowhere = Request(task=task), Path("a released checkpoint that is not here")
    no_weights = TensorStore({})  # nothing is read
    checkpoint = OpenCheckpoint(
        folder=nowhere, files={},
        experts={name: Part(released_transformer(task), no_weights) for name in config.experts},
        text_encoder=Part(released_text_encoder(), no_weights), vae=Part(released_vae(task), no_weights),
        tokenizer=cast(Any, None), tokenizer_file=nowhere,  # no text is read either
    )  # fmt: skip
    sampling = choose_sampling(request, config, Weights(nowhere, distilled=distilled), Check())
    vae_bytes = sum(p.numel() for p in checkpoint.vae.module.parameters()) * torch.float32.itemsize
    return Plan(
        request=request, config=config, checkpoint=checkpoint, device=device, text_device=device, noise_device=device,
        dtype=dtype, text_dtype=dtype, attention="sdpa", layout=Layout(1, 1, 1), loras={}, lora_mode="merge",
        offload=True, room=room, weight_bytes={"VAE": vae_bytes}, sampling=sampling,
        steps=tuple(plan_steps(make_schedule(sampling).timesteps, sampling, config.boundary)),
    )  # fmt: skip


def _estimate(plan: Plan, size: tuple[int, int], machine: Machine) -> Estimate:
    frames = plan.config.frame_num
    video = plan_video(plan, size, frames)
    budget = video.budget
    assert budget is not None, "there is room to share"
    found = seconds(plan, video, machine.rates)
    forwards = sum(1 + step.guided for step in plan.steps)
    vram = int(budget.free / 1e9) if machine.device.type == "cpu" and not budget.resident else None
    advice = budget.problem.rpartition(": ")[2] if budget.problem else ""
    return Estimate(
        plan.request.task, f"{size[0]}x{size[1]}", frames, len(plan.steps), forwards, not advice, advice, _mode(budget),
        vram, budget.tiles, budget.peak, found.read, found.text, found.denoise, found.decode, found.first, found.next,
    )  # fmt: skip


def _mode(budget: Budget) -> str:
    """In few words what the budget's line says in a sentence."""
    if budget.resident:
        return ALL
    sizes = next(iter(budget.experts.values()))
    stay = budget.staying(sizes)
    return ONE if stay == sizes.blocks else f"{stay} of {sizes.blocks} stay"
