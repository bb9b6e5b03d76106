"""What can be known before any weight is read, from headers, images and the machine; and the plan of the run.

Every problem found is reported, not the first one.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from easydict import EasyDict

from lightning.distilled import distilled_twice
from lightning.errors import LoraError
from lightning.lora import Coverage, check
from wan.configs import WAN_CONFIGS
from wan.distributed.cost import Network, plan_lines
from wan.distributed.mesh import Layout, flag_conflicts, layout_problems
from wan.loading.checkpoint import Checkpoint, fetch
from wan.loading.stream import as_dtype, parameter_dtypes
from wan.modules.model import PATCH
from wan.pipeline import TASKS, compute_device, open_loras
from wan.request.settings import Job, Run, Settings
from wan.sampling import Step, make_schedule, plan_steps
from wan.task import choose_attention
from wan.utils.errors import InputError
from wan.utils.images import open_image
from wan.utils.progress import quantity
from wan.utils.video import check_encoder

Found = TypeVar("Found")
MOST_STEPS_SHOWN = 12
MP4_BYTES_PER_PIXEL = 0.6  # 0.3 measured on a lightly noisy 720p clip, and saving needs the file twice


@dataclass
class Plan:
    """What the run will do, as printed before it starts and as kept in every record."""

    settings: Settings
    steps: list[Step] = field(default_factory=list)
    coverage: dict[str, list[Coverage]] = field(default_factory=dict)  # by expert
    fingerprints: dict[str, str] = field(default_factory=dict)  # file -> SHA-256 of its size and ends
    device: str = ""
    dtype: str = ""
    attention: str = ""
    memory: dict[str, int] = field(default_factory=dict)  # part -> bytes
    processes: list[str] = field(default_factory=list)  # how several divide the work
    jobs: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        s = self.settings
        preset = f", settings of {s.preset}" if s.preset else ""
        lines = [f"{s.task} from {s.ckpt_dir}, {s.solver}, shift {s.shift:g}, {len(self.steps)} steps{preset}"]
        lines.append(" | ".join(_step_lines(self.steps)))
        for expert, loras in self.coverage.items():
            lines += [f"LoRA {expert}: {lora.path}: {lora.summary()}" for lora in loras]
        lines += [f"expert {expert}: {path}" for expert, path in s.expert_files.items()]
        residency = ", experts in host memory until needed" if s.offload_model and self.device != "cpu" else ""
        lines.append(f"{self.device}, {self.dtype}, attention {self.attention}{residency}")
        parts = " + ".join(f"{name} {quantity(size, 'B')}" for name, size in self.memory.items())
        lines.append(f"weights in memory: {parts}")
        lines += self.processes
        for job in self.jobs:
            ratio = f" (from {job['image']})" if job["image"] else ""
            size = f"{job['size'][0]}x{job['size'][1]}{ratio}, {job['frames']} frames, {job['tokens']:,} tokens"
            lines.append(f"job {job['index'] + 1}: {size}, seed {job['seed']} -> {job['save_file']}")
        return lines + [f"warning: {text}" for text in self.warnings]

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": [asdict(step) for step in self.steps],
            "loras": {expert: [lora.as_dict() for lora in loras] for expert, loras in self.coverage.items()},
            "fingerprints": self.fingerprints,
            "device": self.device,
            "dtype": self.dtype,
            "attention": self.attention,
            "weight_bytes": self.memory,
            "jobs": self.jobs,
            "warnings": self.warnings,
        }


def _step_lines(steps: list[Step]) -> list[str]:
    """`step 1 t=1000.0 high cfg 1`; of a long plan, one entry for each run of steps that differ in their time alone."""
    if len(steps) <= MOST_STEPS_SHOWN:
        return [f"step {number} {step}" for number, step in enumerate(steps, 1)]
    lines, first = [], 0
    for last, step in enumerate(steps):
        after = steps[last + 1] if last + 1 < len(steps) else None
        if after is None or replace(after, timestep=step.timestep) != step:
            lines.append(f"steps {first + 1} to {last + 1} t={steps[first].timestep:.1f} to {step}")
            first = last + 1
    return lines


class _Problems(list[str]):
    def attempt(self, work: Callable[[], Found]) -> Found | None:
        """`work()`, or None if it finds the input bad: its problems join the list."""
        try:
            return work()
        except InputError as e:
            self.extend(e.problems)
        except LoraError as e:
            self.append(str(e))
        return None


def preflight(run: Run, processes: int = 1) -> Plan:
    """Check everything that needs no weight and say what will happen. InputError with all problems."""
    problems, s = _Problems(), run.settings
    config = copy.deepcopy(WAN_CONFIGS[s.task])
    plan = Plan(s, warnings=list(run.warnings))
    problems.attempt(check_encoder)
    device = problems.attempt(lambda: compute_device(s.device))
    if device:
        plan.device = str(device)
        fp32 = s.dtype == "fp32" or (s.dtype == "auto" and device.type == "cpu")
        plan.dtype = "float32" if fp32 else str(as_dtype(config.param_dtype)).removeprefix("torch.")
    plan.steps = plan_steps(make_schedule(s).timesteps, s, config.boundary)
    _check_lora_steps(s, plan.steps, problems)
    folder = problems.attempt(lambda: fetch(s.ckpt_dir, config, download=not run.request.get("dry_run")))
    if folder:
        checkpoint = Checkpoint(folder, s.task, config, s.expert_files)
        problems.extend(checkpoint.problems)
        _add_loras(plan, checkpoint, problems)
        _add_weights(plan, checkpoint, config)
        if device and checkpoint.experts:
            model, _ = next(iter(checkpoint.experts.values()))
            dtype = as_dtype(plan.dtype)
            chosen = problems.attempt(lambda: choose_attention(s.attention, device, dtype, model))
            if chosen:
                plan.attention = chosen.name
                plan.warnings += chosen.warnings
    for job in run.jobs:
        described = problems.attempt(lambda job=job: _describe(job, s.task, config))  # type: ignore[misc]
        plan.jobs += [described] if described else []
    if folder and checkpoint.experts:
        _add_processes(plan, checkpoint, processes, problems)
    _check_disk(plan, problems)
    if problems:
        raise InputError(problems)
    return plan


def _check_lora_steps(settings: Settings, steps: list[Step], problems: list[str]) -> None:
    if settings.lora_mode == "merge" and any(step.lora != 1.0 for step in steps):
        problems.append(
            f"--preset {settings.preset} changes the LoRA's strength between steps, which a merged LoRA cannot: "
            "add --lora_mode adapter"
        )


def _add_loras(plan: Plan, checkpoint: Checkpoint, problems: _Problems) -> None:
    loras = problems.attempt(lambda: open_loras(plan.settings)) or {}
    for expert, (_, store) in checkpoint.experts.items():
        for lora in loras.get(expert, []):
            twice = distilled_twice(plan.settings.expert_files.get(expert, checkpoint.folder), lora.path)
            if twice and not plan.settings.lora_allow_partial:
                problems.append(f"{twice}; --lora_allow_partial does it all the same")
            found = problems.attempt(
                lambda lora=lora, store=store, expert=expert: check(  # type: ignore[misc]
                    lora, store.shapes, expert=expert, allow_partial=plan.settings.lora_allow_partial
                )
            )
            if found:
                plan.coverage.setdefault(expert, []).append(found)
                plan.warnings += found.warnings
                plan.fingerprints |= {str(file): _fingerprint(file) for file in lora.store.files}


def _add_weights(plan: Plan, checkpoint: Checkpoint, config: EasyDict) -> None:
    """Bytes of the weights as they will lie in memory, and the files' hashes."""
    dtype = as_dtype(plan.dtype or config.param_dtype)
    dtype_of = parameter_dtypes(dtype, plan.settings.convert_model_dtype)
    for name, (module, store) in checkpoint.experts.items():
        plan.memory[f"{name} expert"] = sum(p.numel() * dtype_of(n).itemsize for n, p in module.named_parameters())
        plan.fingerprints |= {str(file): _fingerprint(file) for file in store.files}
    for name, part, width in (
        ("text encoder", checkpoint.text_encoder, dtype.itemsize),
        ("VAE", checkpoint.vae, torch.float32.itemsize),
    ):
        if part:
            plan.memory[name] = sum(p.numel() for p in part[0].parameters()) * width
            plan.fingerprints[str(part[1].path)] = _fingerprint(part[1].path)


def _add_processes(plan: Plan, checkpoint: Checkpoint, processes: int, problems: _Problems) -> None:
    """Whether the model can be divided over the processes as asked, and what that costs."""
    s, (model, store) = plan.settings, next(iter(checkpoint.experts.values()))
    layout = Layout(processes, s.ulysses_size, s.ring_size)
    found = layout_problems(layout, model.num_heads, s.dit_fsdp or s.t5_fsdp)
    found += flag_conflicts(
        ring=s.ring_size, attention=s.attention, t5_fsdp=s.t5_fsdp, t5_cpu=s.t5_cpu, dit_fsdp=s.dit_fsdp,
        lora_mode=s.lora_mode,
    )  # fmt: skip
    problems.extend(found)
    if found or processes == 1 or not plan.jobs:
        return
    experts = [f"{name} expert" for name in checkpoint.experts]
    sharded = (experts if s.dit_fsdp else []) + (["text encoder"] if s.t5_fsdp else [])
    ffn_dim, dim = store.shapes["blocks.0.ffn.0.weight"]
    plan.processes = plan_lines(
        layout,
        Network(dim, ffn_dim, model.num_heads, len(model.blocks)),
        tokens=max(job["tokens"] for job in plan.jobs),
        jobs=len(plan.jobs),
        element_bytes=as_dtype(plan.dtype).itemsize,
        weights={name: size // layout.sequence if name in sharded else size for name, size in plan.memory.items()},
        sharded_bytes=max(plan.memory[name] for name in experts) if s.dit_fsdp else 0,
    )


def _fingerprint(path: Path) -> str:
    """SHA-256 of a file's size, first and last MiB: cheap, and it tells releases apart."""
    with path.open("rb") as file:
        start = file.read(1 << 20)
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 20)))
        return hashlib.sha256(size.to_bytes(8) + start + file.read()).hexdigest()


def _describe(job: Job, task: str, config: EasyDict) -> dict[str, Any]:
    image = open_image(job.image) if job.image else None
    width, height = TASKS[task].video_size(image, job.size)
    time, rows, columns = config.vae_stride
    tokens = ((job.frame_num - 1) // time + 1) * (height // rows // PATCH[1]) * (width // columns // PATCH[2])
    return {
        "index": job.index,
        "size": [width, height],
        "image": f"{image.width}x{image.height}, the area of {job.size[0]}x{job.size[1]}" if image else None,
        "frames": job.frame_num,
        "tokens": tokens,
        "seed": job.seed,
        "save_file": str(job.save_file),
    }


def _check_disk(plan: Plan, problems: list[str]) -> None:
    needed: dict[Path, float] = {}
    for job in plan.jobs:
        folder = Path(job["save_file"]).absolute().parent
        while not folder.exists():
            folder = folder.parent
        pixels = job["frames"] * job["size"][0] * job["size"][1]
        needed[folder] = needed.get(folder, 0.0) + pixels * MP4_BYTES_PER_PIXEL
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            problems.append(f"{folder}: {free / 1e6:.0f} MB free, the videos need about {size / 1e6:.0f} MB")
