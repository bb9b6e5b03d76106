"""From what was asked for to a plan: files, images and the machine looked at, before any weight is read.

Every problem found is reported, not the first one.
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch

from lightning.lora import Coverage, Lora, check
from lightning.releases import refuse_distilled_twice
from wan.checkpoints import hub
from wan.checkpoints.checkpoint import OpenCheckpoint, open_checkpoint
from wan.checkpoints.layout import patterns
from wan.checkpoints.quantised_formats import int8_rotations
from wan.checkpoints.safetensors_file import fingerprint
from wan.cli.checks import Check
from wan.cli.options import Request
from wan.configs import TaskConfig
from wan.distributed.launch import Runtime
from wan.distributed.mesh import Layout, Team, device_problems, layout_problems
from wan.jobs.job import Decode, Generate, Weights, prompts_by_window
from wan.jobs.prompt_files import expanded
from wan.jobs.weights import PARTS
from wan.media.images import digest
from wan.media.video import check_encoder
from wan.modules.attention import choose as choose_attention
from wan.modules.quantised_linear import KERNELS, multiplies
from wan.offload.reader import as_dtype
from wan.planning.memory import plan_videos, what_fits
from wan.planning.plan import Plan, dtype_name, is_absent
from wan.utils.accelerator import Accelerator, gpu_kind, gpus
from wan.utils.errors import InputError, first_line
from wan.utils.progress import quantity

NOTHING_THERE = ("Found no NVIDIA driver", "No CUDA GPUs are available", "Torch not compiled with CUDA")  # PyTorch's
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # PyTorch 2.8 renamed its variable
BF16_CAPABILITY = (8, 0)  # older GPUs compute attention in bf16 by the formula, which needs tokens^2 memory
CUDNN_FOR_29 = 91500  # PyTorch 2.9 hands bf16 Conv3d only to this version of cuDNN and newer ones
OF_CHECKPOINT = ("ckpt_dir", "expert", "vae", "text_encoder", "tokenizer", "quantize", "vae_dtype")  # options
MPS_UNUSED = "--device auto uses the CPU: this machine's MPS device may drift in long videos; --device mps uses it"


def make_plan(outcome: Generate | Decode, runtime: Runtime, before: Plan | None = None) -> Plan:
    """Everything that can be known before a weight is read. InputError with all problems.
    before: another plan of this run, whose checkpoint is not opened again if the same one is asked for."""
    if isinstance(outcome, Generate) and outcome.variants:
        plans: dict[int, Plan] = {}
        for number, variant in outcome.variants.items():
            plans[number] = before = make_plan(variant, runtime, before)
        first = next(iter(plans.values()))
        every = dict.fromkeys([*outcome.warnings, *(text for plan in plans.values() for text in plan.warnings)])
        return replace(first, request=outcome.request, jobs=outcome.jobs, variants=plans, warnings=tuple(every))
    request, config, weights = outcome.request, outcome.config, outcome.weights
    checks = Check()
    checks.attempt(check_encoder)
    if (asked := weights.ckpt_dir) is not None:
        weights = replace(weights, ckpt_dir=checks.attempt(partial(hub.located, "--ckpt_dir", asked.as_posix())))
        if weights.ckpt_dir is None:
            raise checks.error()
    plan = open_plan(request, config, weights, runtime, checks, before=before)
    if not request.dry_run:
        fetched = replace(
            weights,
            ckpt_dir=weights.ckpt_dir and hub.fetch(weights.ckpt_dir, patterns(config, weights.not_of_folder(config))),
            loras=tuple(replace(lora, path=hub.fetch(lora.path)) for lora in weights.loras),
            files={part: hub.fetch(file) for part, file in weights.files.items()},
        )
        plan = open_plan(request, config, fetched, runtime, checks) if fetched != weights else plan
    warnings = [*outcome.warnings, *plan.warnings]
    if isinstance(outcome, Decode):
        return replace(plan, warnings=tuple(warnings))
    plan = plan_videos(plan, outcome.sampling, outcome.jobs)
    plan = replace(plan, jobs=outcome.jobs, preset=weights.release.name if weights.release else None)
    for kind, video in plan.videos.items():
        if video.budget and video.budget.problem:
            hint = f" ({fits} fits)" if (fits := what_fits(plan, kind)) else ""
            raise InputError(f"in {dtype_name(plan.dtype)} {video.budget.problem}{hint}")
    if not outcome.extend:
        warnings += cut_prompts(plan)
    if not plan.uses_negative and any(job.negative_prompt != config.sample_neg_prompt for job in plan.jobs):
        warnings.append("a negative prompt has no effect here: no step is guided (--sample_guide_scale 1, no --nag)")
    return replace(plan, warnings=tuple(warnings))


def open_plan(
    request: Request,
    config: TaskConfig,
    weights: Weights,
    runtime: Runtime,
    checks: Check,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
    before: Plan | None = None,
) -> Plan:
    """A plan of networks and machine, without videos. InputError with all problems, those of `checks` too.
    dtypes: of the transformer and of the text encoder; None: as `--dtype` and the device have it."""
    device = checks.attempt(lambda: compute_device(request.device)) or torch.device("cpu")
    if dtypes is None:
        on_cpu = device.type == "cpu" and not is_absent(request, device)
        fp32 = request.dtype == "fp32" or (request.dtype == "auto" and on_cpu)
        dtypes = (torch.float32,) * 2 if fp32 else (as_dtype(config.param_dtype), as_dtype(config.t5_dtype))
    if request.quantize == "auto":
        request = replace(request, quantize="none" if request.dit_fsdp else fast_format(device, dtypes[0]))
    brought = _brought(request, weights)
    opened = before and all(getattr(before.request, name) == getattr(request, name) for name in OF_CHECKPOINT)
    opening = partial(open_checkpoint, weights.ckpt_dir, config, weights.files, vae_only=weights.vae_only)
    checkpoint = before.checkpoint if before and opened else checks.attempt(opening, brought)
    conflicts = flag_conflicts(request, weights.lora_mode)
    layout = Layout(runtime.team.size, request.ulysses_size, request.ring_size)
    conflicts += device_problems(layout, device, runtime.uses_gpus)
    conflicts += precision_problems(device, dtypes[0], request.vae_dtype)
    loras, coverage, warnings = _open_loras(request, weights, checkpoint, checks, brought)
    if request.device == "auto" and device.type == "cpu" and torch.backends.mps.is_available():
        warnings.append(MPS_UNUSED)
    chosen = None
    if checkpoint is not None:
        model = next(iter(checkpoint.experts.values())).module
        conflicts += layout_problems(layout, model.num_heads, request.dit_fsdp or request.t5_fsdp)
        shape = model.num_heads, model.head_width
        chosen = checks.attempt(lambda: choose_attention(request.attention, device, dtypes[0], *shape))
    checks.problems.extend(conflicts)
    if checkpoint is None or chosen is None or checks.problems:
        raise checks.error()
    if request.quantize != "none" and not opened:
        for part in checkpoint.experts.values():
            part.module.quantise(request.quantize, int8_rotations(part.weights))
    if request.vae_dtype == "bf16" and not opened:
        checkpoint.vae.module.decode_in(torch.bfloat16)
    weight_files = [file for files in checkpoint.weight_files().values() for file in files]
    weight_files += [file for stack in loras.values() for lora in stack for file in lora.store.files]
    return Plan(
        request=request, config=config, checkpoint=checkpoint, device=device,
        text_device=torch.device("cpu") if request.t5_cpu else device,
        noise_device=device if request.noise_device == "auto" else torch.device(request.noise_device),
        dtype=dtypes[0], text_dtype=dtypes[1], attention=chosen.name, layout=layout,
        loras=loras, lora_mode=weights.lora_mode, coverage=coverage,
        offload=runtime.team.size == 1 if request.offload_model is None else request.offload_model,
        room=limit_memory(device, request.vram),
        fingerprints={str(file): fingerprint(file) for file in dict.fromkeys(weight_files)},
        warnings=(*checkpoint.warnings, *warnings, *chosen.warnings),
    )  # fmt: skip


def _brought(request: Request, weights: Weights) -> dict[str, str]:
    """The flag of each file or folder of weights, by its path."""
    flags = {str(path): f"--{part}" if part in PARTS else "--expert" for part, path in weights.files.items()}
    folder = str(expanded(request.lora_dir)) if request.lora_dir else None
    for path in (str(choice.path) for choice in weights.loras):
        flags[path] = "--lora_dir" if folder and path.startswith(folder) else "--lora"
    return flags | ({str(weights.ckpt_dir): "--ckpt_dir"} if weights.ckpt_dir else {})


def _open_loras(
    request: Request, weights: Weights, checkpoint: OpenCheckpoint | None, checks: Check, brought: dict[str, str]
) -> tuple[dict[str, list[Lora]], dict[str, list[Coverage]], list[str]]:
    """(LoRAs by expert, their coverage by expert, warnings). Headers only."""
    loras, coverage, warnings = dict[str, list[Lora]](), dict[str, list[Coverage]](), list[str]()
    for choice in weights.loras:
        opening = partial(Lora.open, choice.path, choice.strength, request.lora_alpha, choice.expert)
        lora = checks.attempt(opening, brought)
        if lora is None or checkpoint is None or choice.expert not in checkpoint.experts:
            continue
        shapes = checkpoint.experts[choice.expert].weights.shapes
        base = checkpoint.files.get(choice.expert) or checkpoint.folder
        if base and not request.lora_allow_partial:
            checks.attempt(partial(refuse_distilled_twice, base, lora.store.files[0], choice.expert))
        settings = {"allow_partial": request.lora_allow_partial, "as_adapter": weights.lora_mode == "adapter"}
        if found := checks.attempt(partial(check, lora, shapes, **settings), brought):
            loras.setdefault(choice.expert, []).append(lora)
            coverage.setdefault(choice.expert, []).append(found)
            warnings += found.warnings
    return loras, coverage, warnings


def check_ranks(team: Team, plan: Plan) -> None:
    """InputError if a rank has other weights, LoRAs, images or code than the first behind the same names."""
    if team.size == 1:
        return
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    own = {**plan.fingerprints, "the program's code": hashlib.sha256(code).hexdigest()}
    for name, path in {named for job in plan.jobs if not job.follows for named in job.pictures.items()}:
        if path is None:
            continue
        own[str(path)] = "unreadable"  # on all ranks: that job alone fails
        with suppress(OSError, InputError):
            own[str(path)] = digest(path, clip=name == "video")
    (first, want), *others = team.gather((socket.gethostname(), own))
    if problems := [
        f"{name}: rank {rank} on {host} has other contents than rank 0 on {first}; copy rank 0's there"
        for rank, (host, found) in enumerate(others, 1)
        for name in found
        if found[name] != want.get(name)
    ]:
        raise InputError(problems)


def cut_prompts(plan: Plan) -> list[str]:
    """A warning about prompts that are longer than the model reads."""
    tokenizer = plan.checkpoint.tokenizer
    sources: dict[str, str] = {}
    for job in reversed(plan.jobs):
        sources |= dict.fromkeys(prompts_by_window(job.prompt, len(plan.video(job).windows)), job.source)
    for job in plan.jobs if plan.uses_negative else ():
        own = job.negative_prompt != plan.request.negative_prompt
        sources[job.negative_prompt] = f"{job.source}, negative prompt" if own else "--negative_prompt"
    if not (lost := {s: n for text, s in sources.items() if (n := tokenizer.count(text) - tokenizer.text_len) > 0}):
        return []
    most = max(lost, key=lost.__getitem__)
    others = f", and of {quantity(len(lost) - 1, 'other prompt')} some" if len(lost) > 1 else ""
    cut = f"the last {lost[most]} {'token is' if lost[most] == 1 else 'tokens are'} cut off{others}"
    return [f"{most}: the model reads {tokenizer.text_len} tokens of a prompt; {cut}"]


def compute_device(name: str) -> torch.device:
    """The device of `--device`, a GPU with its number; "auto" is a GPU where there is one, else the CPU.
    InputError if it is absent, and for "auto" if this machine has a GPU that PyTorch cannot use: a run on the CPU takes
    days, so the user must ask for it."""
    with catch_warnings():
        simplefilter("ignore")  # the messages below say what PyTorch warns of
        gpu, there = gpu_kind(), gpus()
        usable = {gpu: bool(there), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        reason = "" if there else _why_no_cuda()
        driver = Path("/proc/driver/nvidia/version").exists()  # absent on Windows: PyTorch's words must do
        if reason and (driver or not reason.startswith(NOTHING_THERE)):
            raise InputError(
                f"this machine has an NVIDIA driver, but PyTorch cannot use a GPU: {reason}; "
                "repair that, or give --device cpu (slow)"
            )
        name = gpu if there else "cpu"
    device = torch.device(name)
    if not usable.get(device.type) or (device.type == gpu and (device.index or 0) >= len(there)):
        kinds = ", ".join(kind for kind, can in usable.items() if can)
        reason = f" ({_why_no_cuda()})" if device.type == gpu and not there else ""
        raise InputError(f"--device {name}: there is no such device here{reason}; usable: auto, {kinds}")
    if not Accelerator(device).has_memory:
        return device
    api = torch.get_device_module(gpu)
    device = torch.device(gpu, api.current_device() if device.index is None else device.index)
    try:
        api.set_device(device)  # streams and events made without naming a device belong to this one
        api.mem_get_info(device)
        Accelerator(device).check()
    except RuntimeError as e:
        setting = next((f"{n}={os.environ[n]}" for n in ALLOCATOR if n in os.environ), None)
        help = f"unset {setting}" if setting else "give --device cpu (slow)"
        raise InputError(f"--device {name}: the GPU cannot be used: {first_line(e)}; {help}") from e
    return device


def fast_format(device: torch.device, dtype: torch.dtype) -> str:
    """The first of the 8-bit formats that a GPU multiplies; "none" without one."""
    return next((form for form in KERNELS if device.type != "cpu" and multiplies(form, device, dtype)), "none")


def flag_conflicts(request: Request, lora_mode: str) -> list[str]:
    """The settings that exclude each other."""
    ring, kernel, fsdp, quantize = request.ring_size, request.attention, request.dit_fsdp, request.quantize
    rules = [
        (ring > 1 and kernel not in ("auto", "sdpa"),
         f"--attention {kernel}: a ring (--ring_size {ring}) merges results of PyTorch's kernel; use sdpa"),
        (request.t5_fsdp and request.t5_cpu, "--t5_fsdp and --t5_cpu exclude each other; give one of them"),
        (fsdp and quantize != "none",
         f"--quantize {quantize}: FSDP shards whole layers of one dtype; leave it or --dit_fsdp out"),
        (fsdp and lora_mode == "adapter",
         "--lora_mode adapter keeps LoRAs beside whole weights; with --dit_fsdp use --lora_mode merge"),
    ]  # fmt: skip
    return [problem for broken, problem in rules if broken]


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        return first_line(e).rstrip(".")
    return NOTHING_THERE[1]


def precision_problems(device: torch.device, dtype: torch.dtype, vae_dtype: str) -> list[str]:
    """Why the transformer cannot run in `dtype` on the device, or the autoencoder decode with `--vae_dtype`."""
    problems, capability, cudnn = [], Accelerator(device).capability, torch.backends.cudnn.version() or 0
    if capability and dtype == torch.bfloat16 and capability < BF16_CAPABILITY:
        problems.append(
            f"--dtype bf16: {Accelerator(device).name} has no bf16 attention kernel that fits in memory (they need "
            "compute capability 8.0); use --dtype fp32"
        )
    if capability and vae_dtype == "bf16" and torch.__version__.startswith("2.9.") and cudnn < CUDNN_FOR_29:
        problems.append(
            f"--vae_dtype bf16: PyTorch {torch.__version__} may compute it wrongly, with a cuDNN older than 9.15 "
            f"(here {cudnn}); leave it out, or install another PyTorch"
        )
    return problems


def limit_memory(device: torch.device, vram: float | None) -> int | None:
    """Bytes that the run may use: `--vram` (in GB), on a GPU at most what is free; None: no limit.
    On a GPU this also limits PyTorch to `vram`, until the next plan of this process."""
    wanted = None if vram is None else int(vram * 1e9)
    accelerator = Accelerator(device)
    if not accelerator.has_memory:
        return wanted
    accelerator.limit_memory(None)
    free = accelerator.free_bytes
    if wanted is None or wanted >= free:
        return free
    accelerator.limit_memory(wanted)
    return wanted
