"""The device of a run: which one, how much of it may be used, and the attention kernel that serves there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from wan.loading.budget import free_bytes
from wan.modules.attention import Choice, choose
from wan.modules.model import WanModel
from wan.utils.errors import InputError


def compute_device(name: str) -> torch.device:
    """The device of `--device`, a GPU with its number; "auto" is CUDA where there is one, else the CPU.

    InputError if it is not there, and for "auto" if a GPU is there that PyTorch cannot use: a run on the CPU takes
    days, so it must be asked for.
    """
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        if not usable["cuda"] and Path("/proc/driver/nvidia/version").exists():
            raise InputError(
                f"this machine has an NVIDIA driver, but PyTorch cannot use a GPU: {_why_no_cuda()}; "
                "mend that, or give --device cpu (slow)"
            )
        name = "cuda" if usable["cuda"] else "cpu"
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
        raise InputError(f"--device {name}: the GPU cannot be used: {str(e).splitlines()[0]}") from e
    return device


def room_of(device: torch.device, vram: float | None) -> int | None:
    """Bytes that the run may use: `--vram` (in GB), and of a GPU not more than is free; None: not limited."""
    asked = None if vram is None else int(vram * 1e9)
    if device.type != "cuda":
        return asked
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


def _why_no_cuda() -> str:
    """PyTorch's own words: no driver, one that is too old, a build without CUDA, no visible GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        return str(e).splitlines()[0].rstrip(".")
    return "PyTorch sees no GPU"


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, model: WanModel) -> Choice:
    """The attention back end to use; "auto" is the fastest here. InputError if `name` cannot run here."""
    try:
        return choose(name, device, dtype, model.num_heads, model.head_width)
    except ValueError as e:
        raise InputError(str(e)) from e
