"""What to expect: for each task and size that was trained, what fits, how the weights are held, and seconds.

All seconds are estimates (`wan.expected`) by the rates that were measured on this machine a moment ago, which are kept
for the plans of later runs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lightning.releases import RELEASES
from wan.configs import WAN_CONFIGS
from wan.device import host_bytes
from wan.distributed.mesh import Layout
from wan.doctor.counts import released_text_encoder, released_transformer, released_vae
from wan.doctor.findings import GOOD, SKIPPED, WRONG, Machine, Outcome, table
from wan.expected import NEEDED, keep_rates, seconds
from wan.loading.budget import Budget, free_bytes
from wan.loading.checkpoint import Checkpoint
from wan.plan import Plan
from wan.request.checks import Check
from wan.request.options import Request
from wan.request.settings import Weights
from wan.request.weights import choose_sampling
from wan.sampling import make_schedule, plan_steps
from wan.utils.progress import duration, quantity


@dataclass(frozen=True)
class Estimate:
    """One row. Bytes and seconds; the seconds of a stage are the longer of computing and reading what it needs.

    first: the first video. next: a further one of the same run.
    """

    task: str
    size: str
    frames: int
    steps: int
    forwards: int
    fits: bool
    mode: str
    peak: int
    read: int
    text: float
    denoise: float
    decode: float
    first: float
    next: float

    def row(self) -> list[str]:
        seconds = [duration(s) for s in (self.text, self.denoise, self.decode, self.first, self.next)]
        held = [self.mode, quantity(self.peak, "B"), quantity(self.read, "B")]
        steps = f"{self.steps} ({self.forwards} forwards)"
        return [self.task, f"{self.size} x {self.frames}", steps, *held, *(seconds if self.fits else ["-"] * 5)]


HEADING = ["task", "size", "steps", "weights", "peak", "read", "text", "denoise", "decode", "first video", "next"]


def forecast(machine: Machine) -> Outcome:
    """The table, as lines under its sentence."""
    missing = [name for name in NEEDED if name not in machine.rates]
    if missing:
        return Outcome(SKIPPED, f"not measured: {', '.join(missing)}")
    if not machine.small:
        with suppress(OSError, RuntimeError):  # no home, or a full one: plans do without
            keep_rates(machine.device, machine.rates)
    room = free_bytes(machine.device) if machine.device.type == "cuda" else host_bytes()
    estimates = [
        estimate
        for task in WAN_CONFIGS
        for distilled in ([True, False] if _is_distilled(task) else [False])
        for estimate in _of_task(task, distilled, room, machine)
    ]
    values = {"estimates": [asdict(estimate) for estimate in estimates], "room": room}
    where = "the device" if machine.device.type == "cuda" else "the host's memory"
    sentence = f"with {quantity(room, 'B')} of {where}, in {machine.usual} (all seconds are estimates)"
    sentence = sentence.replace("torch.", "")
    lines = table([HEADING, *(estimate.row() for estimate in estimates)])
    if not any(estimate.fits for estimate in estimates):
        return Outcome(WRONG, "\n".join([f"{sentence}: nothing fits", *lines]), "free memory of the device", values)
    return Outcome(GOOD, "\n  ".join([sentence, *lines]), values=values)


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
    config, device, dtype = WAN_CONFIGS[task], machine.device, machine.usual
    request, nowhere = Request(task=task), Path("a released checkpoint that is not here")
    checkpoint = Checkpoint(nowhere, task, config)
    no_store = cast(Any, None)  # nothing is read
    checkpoint.experts = {name: (released_transformer(task), no_store) for name in config.experts}
    checkpoint.text_encoder = released_text_encoder(), no_store
    checkpoint.vae = released_vae(task), no_store
    sampling = choose_sampling(request, config, Weights(nowhere, distilled=distilled), Check())
    vae_bytes = sum(p.numel() for p in checkpoint.vae[0].parameters()) * torch.float32.itemsize
    return Plan(
        request=request, config=config, checkpoint=checkpoint, device=device, text_device=device, noise_device=device,
        dtype=dtype, text_dtype=dtype, attention="sdpa", layout=Layout(1, 1, 1), loras={}, lora_mode="merge",
        offload=True, room=room, weight_bytes={"VAE": vae_bytes}, sampling=sampling,
        steps=tuple(plan_steps(make_schedule(sampling).timesteps, sampling, config.boundary)),
    )  # fmt: skip


def _estimate(plan: Plan, size: tuple[int, int], machine: Machine) -> Estimate:
    frames = plan.config.frame_num
    budget = plan.budget(size, frames, plan.prompts())
    assert budget is not None, "there is room to share"
    found = seconds(plan, budget, size, frames, machine.rates)
    forwards = sum(1 + step.guided for step in plan.steps)
    return Estimate(
        plan.request.task, f"{size[0]}x{size[1]}", frames, len(plan.steps), forwards, budget.problem is None,
        _mode(budget, machine), budget.peak, found.read, found.text, found.denoise, found.decode, found.first,
        found.next,
    )  # fmt: skip


def _mode(budget: Budget, machine: Machine) -> str:
    """In few words what the budget's line says in a sentence; on a CPU blocks stream only where it is asked for."""
    if budget.problem:
        return f"does not fit: {budget.problem.rpartition(': ')[2]}"
    sizes = next(iter(budget.experts.values()))
    stay = budget.staying(sizes)
    held = "all stay" if budget.resident else f"{stay} of {sizes.units} parts stay"
    held = "one expert at a time" if not budget.resident and stay == sizes.units else held
    if machine.device.type == "cpu" and not budget.resident:
        held = f"--vram {int(budget.free / 1e9)}: {held}"
    return held if budget.tiles == (1, 1) else f"{held}, {budget.tiles[0]}x{budget.tiles[1]} tiles"
