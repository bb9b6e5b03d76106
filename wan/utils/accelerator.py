"""Abilities of a compute device. To support another kind of device, add it to `COLLECTIVES` and to `--device`."""

from __future__ import annotations

import gc
import os
import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLLECTIVES = {"cuda": "nccl"}  # kinds with memory and streams of their own -> the backend that connects them


@dataclass(frozen=True)
class Accelerator:
    """A device by its abilities. CPU and MPS compute in the host's memory."""

    device: torch.device

    @property
    def has_memory(self) -> bool:
        """Whether memory and streams are its own."""
        return self.device.type in COLLECTIVES

    @property
    def api(self) -> Any:
        """`torch.cuda`, or the same functions for another kind."""
        return torch.get_device_module(self.device)

    @property
    def name(self) -> str:
        if self.has_memory:
            return str(self.api.get_device_name(self.device))
        return platform.processor() or platform.machine()

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's, (major, minor)."""
        return self.api.get_device_capability(self.device) if self.device.type == "cuda" else None

    @property
    def free_bytes(self) -> int:
        """Bytes that this process can allocate now, with the unused memory that it holds."""
        if not self.has_memory:
            return host_bytes()
        free, _ = self.api.mem_get_info(self.device)
        return int(free + self.api.memory_reserved(self.device) - self.api.memory_allocated(self.device))

    def limit_memory(self, size: int | None) -> None:
        """Hold this process to `size` bytes of the device's own memory; None: no limit."""
        if self.has_memory:
            total = self.api.get_device_properties(self.device).total_memory
            self.api.set_per_process_memory_fraction(1.0 if size is None else size / total, self.device)

    def check(self) -> None:
        """Set up a GPU's allocator and run a kernel. RuntimeError if it cannot compute.
        `expandable_segments` where it works: without it, fragmented memory fails a decode that would fit. Under WSL and
        on virtual GPUs drivers lack what it needs: a first allocation decides."""
        release = Path("/proc/sys/kernel/osrelease")
        chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()  # by the user
        if release.exists() and "microsoft" not in release.read_text().lower() and not chosen:
            configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # from PyTorch 2.10 on
            configure = configure or torch.cuda.memory._set_allocator_settings
            configure("expandable_segments:True")
            try:
                torch.empty(1, device=self.device)
            except RuntimeError:
                configure("expandable_segments:False")
        try:
            torch.zeros(1, device=self.device).add_(1)
            self.api.synchronize(self.device)
        except RuntimeError as e:
            if "no kernel image" not in str(e):
                raise
            major, minor = self.capability or (0, 0)
            built_for = ", ".join(torch.cuda.get_arch_list()) or "none"
            raise RuntimeError(
                f"{self.name} has compute capability {major}.{minor}, and PyTorch {torch.__version__} is built for "
                f"{built_for}: install a PyTorch built for this GPU"
            ) from e

    def current(self) -> AbstractContextManager[object]:
        """Inside this, PyTorch uses the device where none is named. In a new thread it uses the first GPU: kernels of
        other packages go there, and PyTorch 2.13 frees memory that another GPU still uses (pytorch issue 196258)."""
        return self.api.device(self.device) if self.has_memory else nullcontext()

    @property
    def failure(self) -> str:
        """The error that the device answers with, "" while it works: some errors make every later call fail."""
        try:
            if self.has_memory:
                self.api.synchronize(self.device)
            return ""
        except RuntimeError as e:
            return str(e).partition("\n")[0]

    def record_event(self) -> torch.Event | None:
        """An event behind all work issued so far; None where each operation ends before the next."""
        return self.api.current_stream(self.device).record_event() if self.has_memory else None


def gpu_kind() -> str:
    """The kind of GPU that this process can use; the first of all kinds where there is none."""
    return next((kind for kind in COLLECTIVES if torch.get_device_module(kind).is_available()), next(iter(COLLECTIVES)))


def gpus() -> list[Accelerator]:
    """All that this process can use."""
    api = torch.get_device_module(gpu_kind())
    count = api.device_count() if api.is_available() else 0
    return [Accelerator(torch.device(gpu_kind(), index)) for index in range(count)]


def peak_gpu_bytes() -> tuple[int, int]:
    """(allocated, reserved) at the highest, over all GPUs; zeros if none is in use."""
    api = torch.get_device_module(gpu_kind())
    devices = range(api.device_count() if api.is_initialized() else 0)
    return sum(map(api.max_memory_allocated, devices)), sum(map(api.max_memory_reserved, devices))


def synchronize() -> None:
    """Wait for the device, if there is one beside the CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def free_memory() -> None:
    """After something large was dropped."""
    gc.collect()  # models spread over devices refer to themselves
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


def host_bytes() -> int:
    """Host memory available without swapping, the page cache included; 0 if unknown."""
    with suppress(OSError):  # not Linux: asked below
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(AttributeError, ValueError, OSError):  # AttributeError: Windows has no such function
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
