"""How fast the machine is: the rates that time estimates divide counted work by. Random data: zeros run faster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch

from wan.doctor.findings import GOOD, SKIPPED, CheckOutcome, DoctorCheck, Machine, short
from wan.doctor.measure import interleaved
from wan.modules.attention import BACKENDS, choose
from wan.modules.vae import VAES, WanVAE
from wan.planning.flops import decode_operations
from wan.planning.time_estimate import ATTENTION, COPY, DISK, MATMUL, PAGEABLE, PINNED, VAE
from wan.utils.accelerator import Accelerator
from wan.utils.progress import quantity

REPEATS = 3
PIECE = 8 << 20  # bytes of one read, about as large as those of the loading code
VAE_ROOM = 12e9  # bytes for the larger of the two timed decodes


def rate_checks() -> list[DoctorCheck]:
    return [
        DoctorCheck("rate: matmul", matmul),
        DoctorCheck("rate: attention", attention_rate),
        DoctorCheck("rate: VAE", vae),
        DoctorCheck("rate: device copy", device_copy),
        DoctorCheck("rate: host to device", host_to_device),
        DoctorCheck("rate: disk read", disk_read, "give --disk FOLDER where 300 MB can be written"),
    ]


def matmul(machine: Machine) -> CheckOutcome:
    """Square matrices in the transformer's usual precision."""
    size = 64 if machine.small else 8192 if _is_gpu(machine) else 1024
    a, b = (torch.randn(size, size, device=machine.device, dtype=machine.usual) for _ in range(2))
    rate = 2 * size**3 / _seconds(machine, lambda: a @ b)
    return _operations(machine, MATMUL, rate, f"{short(machine.usual)} {size}x{size}")


def attention_rate(machine: Machine) -> CheckOutcome:
    """Self-attention of the 14B network's heads through the back end that `--attention auto` picks."""
    tokens, heads, width = (64, 2, 128) if machine.small else (16384, 40, 128) if _is_gpu(machine) else (1024, 8, 128)
    name = choose("auto", machine.device, machine.usual, heads, width).name
    q, k, v = (torch.randn(tokens, heads, width, device=machine.device, dtype=machine.usual) for _ in range(3))
    rate = 4 * tokens**2 * heads * width / _seconds(machine, lambda: BACKENDS[name](q, k, v))
    return _operations(machine, ATTENTION, rate, f"{name}, {tokens:,} tokens, {heads} heads of {width}")


def vae(machine: Machine) -> CheckOutcome:
    """A decode by Wan2.1's VAE at its released width, with random weights."""
    kind, shape = VAES[16], (16, 3, 8, 8)
    if machine.small:
        kind, shape = (16, 16, 16, False), (16, 3, 2, 2)
    elif _is_gpu(machine):
        shape = (16, 3, 60, 104) if Accelerator(machine.device).free_bytes > VAE_ROOM else (16, 3, 20, 36)
    module = random_vae(kind, machine.device)
    latent = torch.randn(shape, device=machine.device)
    with torch.inference_mode():
        (seconds,) = interleaved([lambda: [None for _ in module.decode(latent)]], repeats=1)
    rate = decode_operations(module, shape) / seconds
    return _operations(machine, VAE, rate, f"float32, latent {'x'.join(map(str, shape))}")


def random_vae(kind: tuple[int, int, int, bool], device: torch.device) -> WanVAE:
    """An autoencoder of this size with random weights that keep activations near 1."""
    with torch.device("meta"):
        module = WanVAE(*kind)
    module.requires_grad_(False).to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(0, max(parameter[0].numel(), 25) ** -0.5)
    module.use_channels_last()
    return module


def device_copy(machine: Machine) -> CheckOutcome:
    """Bytes read and bytes written count."""
    size = 1 << 20 if machine.small else 1 << 27
    if _is_gpu(machine):
        size = min(1 << 30, Accelerator(machine.device).free_bytes // 8)
    source, target = (torch.ones(size // 4, device=machine.device) for _ in range(2))
    return _bytes(machine, {COPY: 2 * size / _seconds(machine, lambda: target.copy_(source))})


def host_to_device(machine: Machine) -> CheckOutcome:
    if not _is_gpu(machine):
        return CheckOutcome(SKIPPED, f"{machine.device} computes in the host's memory")
    size = 1 << 28
    target = torch.empty(size, dtype=torch.uint8, device=machine.device)
    pageable = torch.ones(size, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    return _bytes(machine, {
        PINNED: size / _seconds(machine, lambda: target.copy_(pinned)),
        PAGEABLE: size / _seconds(machine, lambda: target.copy_(pageable)),
    })  # fmt: skip


def disk_read(machine: Machine) -> CheckOutcome:
    """Write a file, drop it from the page cache, read it once from start to end."""
    size = 1 << 20 if machine.small else 1 << 28
    block = os.urandom(min(size, PIECE))
    with tempfile.NamedTemporaryFile(dir=machine.disk) as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        dropped = hasattr(os, "posix_fadvise")
        if dropped:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(PIECE)
        with open(file.name, "rb", buffering=0) as reader:

            def read() -> None:
                while reader.readinto(buffer):
                    pass

            (seconds,) = interleaved([read], repeats=1, warm_up=0)
    cache = "dropped from the page cache first" if dropped else "perhaps from the page cache"
    return _bytes(machine, {DISK: size / seconds}, f" ({machine.disk}; {cache})")


def _is_gpu(machine: Machine) -> bool:
    return Accelerator(machine.device).has_memory


def _seconds(machine: Machine, work: Callable[[], object]) -> float:
    """Seconds of one call; a GPU gets several at a time, so that the wait for it does not count."""
    calls = 10 if _is_gpu(machine) else 1
    (seconds,) = interleaved([lambda: [work() for _ in range(calls)]], repeats=REPEATS)
    return seconds / calls


def _operations(machine: Machine, name: str, rate: float, details: str) -> CheckOutcome:
    machine.rates[name] = rate
    return CheckOutcome(GOOD, f"{rate / 1e12:.3g} TFLOP/s ({details})", values={name: rate})


def _bytes(machine: Machine, rates: dict[str, float], details: str = "") -> CheckOutcome:
    machine.rates |= rates
    parts = [f"{name} {quantity(rate, 'B')}/s" for name, rate in rates.items()]
    return CheckOutcome(GOOD, ", ".join(parts) + details, values=dict(rates))
