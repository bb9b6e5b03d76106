"""The device of a run: which one, how much of it may be used, and the attention kernel that serves there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from wan.offload.budget import free_bytes
from wan.utils.errors import InputError, first_line

LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}  # by CUDA's major version: NVIDIA's minor version compatibility
NOTHING_THERE = ("Found no NVIDIA driver", "No CUDA GPUs are available", "Torch not compiled with CUDA")  # PyTorch's
OWN_BYTES = int(1e9)  # a process's context on a GPU, which PyTorch does not count, and what a desktop shows


def compute_device(name: str) -> torch.device:
    """The device of `--device`, a GPU with its number; "auto" is CUDA where there is one, else the CPU.

    InputError if it is not there, and for "auto" if a GPU is there that PyTorch cannot use: a run on the CPU takes
    days, so it must be asked for.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of what is told below
        cuda = torch.cuda.is_available() and torch.cuda.device_count() > 0
    usable = {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        reason = "" if cuda else _why_no_cuda()
        driver = Path("/proc/driver/nvidia/version").exists()  # not under Windows, there PyTorch's words must do
        if reason and (driver or not reason.startswith(NOTHING_THERE)):
            raise InputError(
                f"this machine has an NVIDIA driver, but PyTorch cannot use a GPU: {reason}; "
                "mend that, or give --device cpu (slow)"
            )
        name = "cuda" if cuda else "cpu"
    device = torch.device(name)
    if not usable.get(device.type):
        there = ", ".join(kind for kind, can in usable.items() if can)
        reason = f" ({_why_no_cuda()})" if device.type == "cuda" else ""
        raise InputError(f"--device {name}: there is no such device here{reason}; usable: auto, {there}")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.index >= count:
        there = ", ".join(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count))
        raise InputError(f"--device {name}: there is no such GPU here; there {'is' if count == 1 else 'are'} {there}")
    try:
        torch.cuda.set_device(device)  # streams and events made without naming a device belong to this one
        torch.cuda.mem_get_info(device)
    except RuntimeError as e:
        raise InputError(f"--device {name}: the GPU cannot be used: {first_line(e)}") from e
    return device


def limit_memory(device: torch.device, vram: float | None) -> int | None:
    """Bytes that the run may use: `--vram` (in GB), and of a GPU not more than is free; None: not limited.

    On a GPU PyTorch is held to `vram`, until the next plan of this process.
    """
    asked = None if vram is None else int(vram * 1e9)
    if device.type != "cuda":
        return asked
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    free = free_bytes(device)
    if asked is None or asked >= free:
        return free
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(asked / total, device)  # what PyTorch keeps for later counts too
    return asked


def host_bytes() -> int:
    """Host memory that can be had without swapping, the page cache included; 0 where it is not told."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages: Callable[[str], int] | None = getattr(os, "sysconf", None)
    try:
        return pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE") if pages else 0
    except (ValueError, OSError):
        return 0


def held_by_others(device: torch.device) -> str:
    """What other processes hold of a GPU, as the end of a sentence about too little room; "" if next to nothing."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    held = total - free - torch.cuda.memory_reserved(device)
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
