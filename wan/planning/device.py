"""Choose the device of a run, and how much of its memory the run may use."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from wan.utils.accelerator import Accelerator, allocator_setting, gpu_kind, gpus
from wan.utils.errors import InputError, first_line

LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}  # by CUDA's major version: NVIDIA's minor version compatibility
NOTHING_THERE = ("Found no NVIDIA driver", "No CUDA GPUs are available", "Torch not compiled with CUDA")  # PyTorch's
BF16_CAPABILITY = (8, 0)  # older GPUs compute attention in bf16 by the formula, which needs tokens^2 memory
CUDNN_FOR_29 = 91500  # PyTorch 2.9 hands bf16 Conv3d only to this version of cuDNN and newer ones
OWN_BYTES = int(1e9)  # a process's context on a GPU, which PyTorch does not count, and what a desktop shows


def compute_device(name: str) -> torch.device:
    """The device of `--device`, a GPU with its number; "auto" is a GPU where there is one, else the CPU.

    InputError if it is absent, and for "auto" if this machine has a GPU that PyTorch cannot use: a run on the CPU takes
    days, so the user must ask for it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the messages below say what PyTorch warns of
        gpu = gpu_kind()
        api = torch.get_device_module(gpu)
        usable = {gpu: bool(gpus()), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        reason = "" if usable[gpu] else _why_no_cuda()
        driver = Path("/proc/driver/nvidia/version").exists()  # absent on Windows: PyTorch's words must do
        if reason and (driver or not reason.startswith(NOTHING_THERE)):
            raise InputError(
                f"this machine has an NVIDIA driver, but PyTorch cannot use a GPU: {reason}; "
                "repair that, or give --device cpu (slow)"
            )
        name = gpu if usable[gpu] else "cpu"
    device = torch.device(name)
    if not usable.get(device.type):
        kinds = ", ".join(kind for kind, can in usable.items() if can)
        reason = f" ({_why_no_cuda()})" if device.type == "cuda" else ""
        raise InputError(f"--device {name}: there is no such device here{reason}; usable: auto, {kinds}")
    if not Accelerator(device).has_memory:
        return device
    count = api.device_count()
    device = torch.device(gpu, api.current_device() if device.index is None else device.index)
    if device.index >= count:
        there = ", ".join(f"{each.device} ({each.name})" for each in gpus())
        raise InputError(f"--device {name}: there is no such GPU here; there {'is' if count == 1 else 'are'} {there}")
    try:
        api.set_device(device)  # streams and events made without naming a device belong to this one
        api.mem_get_info(device)
        Accelerator(device).check()
    except RuntimeError as e:
        advice = f"unset {allocator_setting()}, or " if allocator_setting() else ""
        advice += "give --device cpu (slow)"
        raise InputError(f"--device {name}: the GPU cannot be used: {first_line(e)}; {advice}") from e
    return device


def device_warnings(name: str, device: torch.device) -> list[str]:
    """Sentences about a device that `--device auto` leaves unused."""
    if name == "auto" and device.type == "cpu" and torch.backends.mps.is_available():
        return [
            "--device auto uses the CPU, not this machine's MPS device, whose results may drift in long videos; "
            "run `python -m wan.doctor --device mps`, and if nothing is wrong, give --device mps"
        ]
    return []


def precision_problems(device: torch.device, dtype: torch.dtype, vae_dtype: str) -> list[str]:
    """Why the transformer cannot run in `dtype` on the device, or the autoencoder decode with `--vae_dtype`."""
    problems, accelerator, cudnn = [], Accelerator(device), torch.backends.cudnn.version() or 0
    if accelerator.capability is None:
        return []
    if dtype == torch.bfloat16 and accelerator.capability < BF16_CAPABILITY:
        problems.append(
            f"--dtype bf16: {accelerator.name} has no bf16 attention kernel that fits in memory (they need compute "
            "capability 8.0); use --dtype fp32"
        )
    if vae_dtype == "bf16" and torch.__version__.startswith("2.9.") and cudnn < CUDNN_FOR_29:
        problems.append(
            f"--vae_dtype bf16: PyTorch {torch.__version__} computes it without cuDNN, which takes more memory and may "
            f"be wrong, unless cuDNN is 9.15 or newer (here {cudnn}); leave it out, or install another PyTorch"
        )
    return problems


def limit_memory(device: torch.device, vram: float | None) -> int | None:
    """Bytes that the run may use: `--vram` (in GB), on a GPU at most what is free; None: no limit.

    On a GPU this also limits PyTorch to `vram`, until the next plan of this process.
    """
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


def held_by_others(device: torch.device) -> str:
    """The GPU memory that other processes hold, as the end of a sentence; "" if it is next to nothing."""
    held = Accelerator(device).bytes_of_others
    return f"; other processes hold {held / 1e9:.1f} GB of it (nvidia-smi names them)" if held > OWN_BYTES else ""


def _why_no_cuda() -> str:
    """Why PyTorch can use no GPU: a driver that is too old, else in its own words (no driver, a build without CUDA)."""
    try:
        torch.cuda.init()
        said = "No CUDA GPUs are available"
    except (RuntimeError, AssertionError) as e:
        said = first_line(e).rstrip(".")
    if "driver on your system is too old" in said:
        made_for = torch.version.cuda or "a newer CUDA"
        least = LEAST_DRIVER.get(made_for.partition(".")[0])
        needed = f", which needs driver {least} or newer" if least else ""
        return (
            f"its driver is too old for this PyTorch, made for CUDA {made_for}{needed}: "
            "update it, or install a PyTorch made for an older CUDA"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return said if visible is None else f"{said}; CUDA_VISIBLE_DEVICES is '{visible}'"
