"""What to expect: for each task and size that was trained, what fits, how the weights are held, and seconds.

All seconds are estimates: operations counted from the networks, and bytes of the released files, divided by the rates
that were measured on this machine a moment ago. What is between the products, and writing the mp4, is not in them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lightning.releases import RELEASES
from wan.configs import WAN_CONFIGS
from wan.distributed.mesh import Layout
from wan.doctor import rates
from wan.doctor.counts import (
    VAES,
    decode_operations,
    encode_operations,
    network,
    released_text_encoder,
    released_transformer,
    released_vae,
    text_operations,
    vae_kind,
)
from wan.doctor.findings import GOOD, SKIPPED, WRONG, Machine, Outcome, table
from wan.doctor.machine import host_bytes
from wan.loading.budget import Budget, free_bytes
from wan.loading.checkpoint import Checkpoint
from wan.plan import Plan, latent_shape
from wan.request.checks import Check
from wan.request.options import Request
from wan.request.settings import Weights
from wan.request.weights import choose_sampling
from wan.sampling import make_schedule, plan_steps
from wan.utils.progress import duration, quantity

FILE_BYTES = 4  # of a weight of a released expert, stored in float32; the text encoder's are bf16
NEEDED = (rates.MATMUL, rates.ATTENTION, rates.VAE, rates.DISK)


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
    config, task, speed = plan.config, plan.request.task, machine.rates
    kind = VAES[vae_kind(task)]
    frames = config.frame_num
    budget = plan.budget(size, frames, plan.prompts())
    assert budget is not None, "there is room to share"
    forwards = Counter(step.expert for step in plan.steps for _ in range(1 + step.guided))
    read = sum(_bytes_read(budget, name, count, plan.dtype) for name, count in forwards.items())
    feed = min(speed[rates.DISK], speed.get(rates.PINNED, float("inf")))
    tokens, sizes = plan.tokens(size, frames), network(task)
    forward = sizes.linear(tokens) / speed[rates.MATMUL] + sizes.attention(tokens) / speed[rates.ATTENTION]
    computing = forward * forwards.total()
    encoder = cast(Any, plan.checkpoint.text_encoder)[0]
    text_bytes = 2 * sum(p.numel() for n, p in encoder.named_parameters() if n != "token_embedding.weight")
    thinking = plan.prompts() * text_operations(encoder, config.text_len) / speed[rates.MATMUL]
    image = encode_operations(kind, size, frames) / speed[rates.VAE] if config.mask_channels else 0.0
    decode = decode_operations(kind, latent_shape(config, size, frames)) / speed[rates.VAE]
    text, denoise = max(thinking, text_bytes / feed), max(computing, read / feed)
    again = computing if budget.resident else denoise
    return Estimate(
        task, f"{size[0]}x{size[1]}", frames, len(plan.steps), forwards.total(), budget.problem is None,
        _mode(budget, machine), budget.peak, read, text, denoise, decode,
        first=text + image + denoise + decode, next=text + image + again + decode,
    )  # fmt: skip


def _bytes_read(budget: Budget, expert: str, forwards: int, dtype: torch.dtype) -> int:
    """Of the expert's file in one video: what stays once, what passes through once a forward."""
    sizes = budget.experts[expert]
    stay = budget.staying(sizes)
    return (stay + (sizes.units - stay) * forwards) * sizes.unit_bytes * FILE_BYTES // dtype.itemsize


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
