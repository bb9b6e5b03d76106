"""What to expect: for each task and trained size, whether it fits, how the weights are held, and seconds.

Seconds are estimates (`wan.planning.time_estimate`) from the rates just measured on this machine, which are kept for
the plans of later runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightning.releases import RELEASES
from wan.checkpoints.checkpoint import released_checkpoint
from wan.cli.checks import Check
from wan.cli.options import Request
from wan.configs import TASKS
from wan.distributed.mesh import Layout
from wan.doctor.machine import GOOD, SKIPPED, WRONG, Finding, Machine
from wan.jobs.job import Weights
from wan.jobs.weights import choose_sampling
from wan.planning.memory import plan_video, plan_videos
from wan.planning.plan import Plan, dtype_name
from wan.planning.time_estimate import NEEDED_RATES, keep_rates, seconds
from wan.utils.accelerator import Accelerator
from wan.utils.progress import duration, quantity

ALL, ONE = "all stay", "one at a time"


def forecast(machine: Machine) -> Finding:
    """The table, as lines under its sentence."""
    if missing := [name for name in NEEDED_RATES if name not in machine.rates]:
        return Finding(SKIPPED, f"not measured: {', '.join(missing)}")
    if not machine.small:
        with suppress(OSError, RuntimeError):  # no home, or a full one: plans do without
            keep_rates(machine.device, machine.rates)
    accelerator = Accelerator(machine.device)
    room, place = accelerator.free_bytes, "the device" if accelerator.has_memory else "the host's memory"
    few_steps = {task for r in RELEASES if r.kind != "recipe" and not r.refused for task in r.tasks}
    plans = [
        released_plan(task, distilled, room, machine)
        for task in TASKS
        for distilled in ([True, False] if task in few_steps else [False])
    ]
    estimates = [
        _estimate(plan, (width, height), machine)
        for plan in plans
        for width, height in (map(int, size.split("*")) for size in plan.config.sizes)
        if width > height  # portrait costs the same
    ]
    fits = any(estimate["fits"] for estimate in estimates)
    sentence = f"with {quantity(room, 'B')} of {place}, in {dtype_name(machine.usual)} (all seconds are estimates)"
    lines = [sentence if fits else f"{sentence}: nothing fits", *rows_of(estimates), *notes(estimates)]
    advice = "" if fits else "free memory of the device"
    return Finding(GOOD if fits else WRONG, "\n  ".join(lines), advice, {"estimates": estimates, "room": room})


def released_plan(task: str, distilled: bool, room: int, machine: Machine) -> Plan:
    """The plan of the task's released checkpoint, which need not exist here. distilled: with few-step weights."""
    config, device, dtype = TASKS[task], machine.device, machine.usual
    request, weights = Request(task=task), Weights(None, distilled=distilled)
    plan = Plan(
        request=request, config=config, checkpoint=released_checkpoint(config), device=device, text_device=device,
        noise_device=device, dtype=dtype, text_dtype=dtype, attention="sdpa", layout=Layout(1, 1, 1), loras={},
        lora_mode="merge", offload=True, room=room,
    )  # fmt: skip
    return plan_videos(plan, choose_sampling(request, config, weights, Check()), [])


def _estimate(plan: Plan, size: tuple[int, int], machine: Machine) -> dict[str, Any]:
    """One row. Bytes and seconds; a stage takes the longer of computing and reading its weights.
    mode: how the weights are held. tiles: in which a frame is decoded. advice: flags that would make it fit. vram: GB
    to ask for on a CPU, where blocks stream only on demand. first, next: videos of the same run."""
    video = plan_video(plan, size, plan.config.frame_num)
    budget, found = video.budget, seconds(plan, video, machine.rates)
    assert budget is not None, "the plan has a limit"
    sizes = next(iter(budget.experts.values()))
    stay = budget.staying(sizes)
    vram = int(budget.free / 1e9) if machine.device.type == "cpu" and not budget.resident else None
    return {
        "task": plan.request.task, "size": f"{size[0]}x{size[1]}", "frames": plan.config.frame_num,
        "steps": len(plan.steps), "forwards": sum(1 + step.guided for step in plan.steps),
        "fits": budget.problem is None, "advice": (budget.problem or "").rpartition(": ")[2],
        "mode": ALL if budget.resident else ONE if stay == sizes.blocks else f"{stay} of {sizes.blocks} stay",
        "vram": vram, "tiles": budget.tiles, "peak": budget.peak, "read": found.read, "text": found.text,
        "denoise": found.denoise, "decode": found.decode, "first": found.first, "next": found.next,
    }  # fmt: skip


def rows_of(estimates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned lines, for a terminal of 80 columns; the first is the heading."""
    rows = [["task", "video", "steps", "weights", "tiles", "first video", "next"]]
    for one in estimates:
        tiles = "-" if one["tiles"] == (1, 1) else "x".join(map(str, one["tiles"]))
        times = [one["mode"], tiles, duration(one["first"]), duration(one["next"])]
        if not one["fits"]:
            times = [f"needs {quantity(one['peak'], 'B')}", tiles, "does not fit", "-"]
        rows.append([one["task"], f"{one['size']}x{one['frames']}", str(one["steps"]), *times])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def notes(estimates: Sequence[Mapping[str, Any]]) -> list[str]:
    """The legend: a line for each thing in these rows that needs one."""
    fitting = [one for one in estimates if one["fits"]]
    modes, vram = {one["mode"] for one in fitting}, next((one["vram"] for one in fitting if one["vram"]), None)
    legend = {
        "few steps: with few-step weights; many: the released ones alone, with guidance": True,
        f"{ONE}: the expert at work stays, then the other one takes its memory": ONE in modes,
        "N of M stay: of an expert's M blocks; the others are read when needed": bool(modes - {ALL, ONE}),
        f"not all stay: only with --vram {vram} on a CPU": vram is not None,
        "tiles: a frame is decoded in this many pieces": any(one["tiles"] != (1, 1) for one in estimates),
        "next: each further video of the same run": bool(fitting),
    }
    videos: dict[str, dict[str, None]] = {}  # by advice
    for one in estimates:
        if not one["fits"]:
            videos.setdefault(one["advice"], {})[f"{one['task']} {one['size']}"] = None
    return [
        *(note for note, needed in legend.items() if needed),
        *(f"does not fit: {advice} ({', '.join(named)})" for advice, named in videos.items()),
        "each stage's seconds, the peak and the bytes to read: --json",
    ]
