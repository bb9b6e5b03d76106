"""From what was asked for to a plan: files, images and the machine looked at, before any weight is read.

Every problem found is reported, not the first one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from easydict import EasyDict

from lightning.distilled import distilled_twice
from lightning.lora import Coverage, Lora, check
from lightning.tensorfile import fingerprint
from wan.device import choose_attention, compute_device, room_of
from wan.distributed.mesh import Layout, device_problems, flag_conflicts, layout_problems
from wan.distributed.runtime import Runtime
from wan.loading.checkpoint import Checkpoint, fetch
from wan.loading.stream import as_dtype, parameter_dtypes
from wan.plan import Plan
from wan.request.checks import Check
from wan.request.options import Request
from wan.request.settings import Decode, Generate, Job, Weights
from wan.sampling import make_schedule, plan_steps
from wan.utils.errors import InputError
from wan.utils.video import check_encoder

MP4_BYTES_PER_PIXEL = 0.6  # 0.3 measured on a lightly noisy 720p clip, and saving needs the file twice


def make_plan(outcome: Generate | Decode, runtime: Runtime) -> Plan:
    """Everything that can be known before a weight is read. InputError with all problems."""
    checks = Check()
    checks.attempt(check_encoder)
    generate = outcome if isinstance(outcome, Generate) else None
    if generate:
        _check_disk(generate.jobs, checks)
    download = not outcome.request.dry_run
    weights, asked = outcome.weights, outcome.weights.ckpt_dir
    if asked is not None:
        given = [part for part, _ in (*weights.expert_files, *weights.files)]
        folder = checks.attempt(lambda: fetch(asked, outcome.config, download, given))
        weights = replace(weights, ckpt_dir=folder)
    opened = weights.ckpt_dir is not None or asked is None
    plan = open_plan(outcome.request, outcome.config, weights, runtime, checks) if opened else None
    checks.stop()
    assert plan is not None, "without problems there is a plan"
    if generate is None:
        return replace(plan, warnings=(*outcome.warnings, *plan.warnings))
    steps = plan_steps(make_schedule(generate.sampling).timesteps, generate.sampling, outcome.config.boundary)
    plan = replace(
        plan,
        sampling=generate.sampling,
        steps=tuple(steps),
        jobs=generate.jobs,
        preset=weights.release.name if weights.release else None,
        warnings=(*outcome.warnings, *plan.warnings),
    )
    budget = plan.budget(plan.largest().size, plan.largest().frame_num, plan.prompts()) if plan.jobs else None
    if budget and budget.problem:
        raise InputError(budget.problem)
    return plan


def open_plan(
    request: Request,
    config: EasyDict,
    weights: Weights,
    runtime: Runtime,
    checks: Check,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> Plan:
    """The part of a plan that tells of networks and machine; what is wrong goes to `checks`.

    dtypes: of the transformer and of the text encoder; None: as `--dtype` and the device have it.
    """
    device = checks.attempt(lambda: compute_device(request.device)) or torch.device("cpu")
    if dtypes is None:
        fp32 = request.dtype == "fp32" or (request.dtype == "auto" and device.type == "cpu")
        wanted = ("float32", "float32") if fp32 else (config.param_dtype, config.t5_dtype)
        dtypes = as_dtype(wanted[0]), as_dtype(wanted[1])
    checkpoint = Checkpoint(
        weights.ckpt_dir, request.task, config, {**dict(weights.expert_files), **dict(weights.files)}
    )
    checks.attempt(checkpoint.raise_problems)
    if checkpoint.vae and request.vae_dtype == "bf16":
        checkpoint.vae[0].decode_in(torch.bfloat16)
    conflicts = flag_conflicts(
        ring=request.ring_size, attention=request.attention, t5_fsdp=request.t5_fsdp, t5_cpu=request.t5_cpu,
        dit_fsdp=request.dit_fsdp, lora_mode=weights.lora_mode,
    )  # fmt: skip
    layout = Layout(runtime.team.size, request.ulysses_size, request.ring_size)
    conflicts += device_problems(layout, device, runtime.uses_gpus)
    loras, coverage, warnings = _open_loras(request, weights, checkpoint, checks)
    attention = request.attention
    if checkpoint.experts:
        model, _ = next(iter(checkpoint.experts.values()))
        conflicts += layout_problems(layout, model.num_heads, request.dit_fsdp or request.t5_fsdp)
        if chosen := checks.attempt(lambda: choose_attention(request.attention, device, dtypes[0], model)):
            attention = chosen.name
            warnings += chosen.warnings
    for problem in conflicts:
        checks.problem(problem)
    return Plan(
        request=request,
        config=config,
        checkpoint=checkpoint,
        device=device,
        text_device=torch.device("cpu") if request.t5_cpu else device,
        noise_device=device if request.noise_device == "auto" else torch.device(request.noise_device),
        dtype=dtypes[0],
        text_dtype=dtypes[1],
        attention=attention,
        layout=layout,
        loras=loras,
        lora_mode=weights.lora_mode,
        offload=runtime.team.size == 1 if request.offload_model is None else request.offload_model,
        room=room_of(device, request.vram),
        coverage=coverage,
        fingerprints=_fingerprints(checkpoint, loras),
        weight_bytes=_weight_bytes(checkpoint, dtypes[0], request.convert_model_dtype),
        warnings=tuple(warnings),
    )


def _open_loras(
    request: Request, weights: Weights, checkpoint: Checkpoint, checks: Check
) -> tuple[dict[str, list[Lora]], dict[str, list[Coverage]], list[str]]:
    """(LoRAs and what they do, by expert; warnings). Headers only."""
    loras: dict[str, list[Lora]] = {}
    coverage: dict[str, list[Coverage]] = {}
    warnings: list[str] = []
    for choice in weights.loras:
        lora = checks.attempt(
            lambda choice=choice: Lora.open(choice.path, choice.strength, request.lora_alpha, choice.expert)  # type: ignore[misc]
        )
        if lora is None or choice.expert not in checkpoint.experts:
            continue
        shapes = checkpoint.experts[choice.expert][1].shapes
        base = checkpoint.files.get(choice.expert) or checkpoint.folder
        twice = distilled_twice(base, lora.path, choice.expert) if base else None
        if twice and not request.lora_allow_partial:
            checks.problem(f"{twice}; --lora_allow_partial does it all the same")
        found = checks.attempt(
            lambda lora=lora, shapes=shapes, expert=choice.expert: check(  # type: ignore[misc]
                lora, shapes, expert=expert, allow_partial=request.lora_allow_partial
            )
        )
        if found:
            loras.setdefault(choice.expert, []).append(lora)
            coverage.setdefault(choice.expert, []).append(found)
            warnings += found.warnings
    return loras, coverage, warnings


def _fingerprints(checkpoint: Checkpoint, loras: Mapping[str, list[Lora]]) -> dict[str, str]:
    files = [file for part in checkpoint.weight_files().values() for file in part]
    files += [file for chosen in loras.values() for lora in chosen for file in lora.store.files]
    return {str(file): fingerprint(file) for file in dict.fromkeys(files)}


def _weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype, convert_all: bool) -> dict[str, int]:
    dtype_of = parameter_dtypes(dtype, convert_all)
    sizes = {
        f"{name} expert": sum(p.numel() * dtype_of(n).itemsize for n, p in module.named_parameters())
        for name, (module, _) in checkpoint.experts.items()
    }
    if checkpoint.text_encoder:
        sizes["text encoder"] = sum(p.numel() for p in checkpoint.text_encoder[0].parameters()) * dtype.itemsize
    if checkpoint.vae:
        sizes["VAE"] = sum(p.nbytes for p in checkpoint.vae[0].parameters())
    return sizes


def _check_disk(jobs: tuple[Job, ...], checks: Check) -> None:
    needed: dict[Path, float] = {}
    for job in jobs:
        folder = job.save_file.absolute().parent
        while not folder.exists():
            folder = folder.parent
        pixels = job.frame_num * job.size[0] * job.size[1]
        needed[folder] = needed.get(folder, 0.0) + pixels * MP4_BYTES_PER_PIXEL
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            checks.problem(f"{folder}: {free / 1e6:.0f} MB free, the videos need about {size / 1e6:.0f} MB")
