"""How fast the machine is: the rates that time estimates divide counted work by. Random data: zeros run faster."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from wan.doctor.machine import GOOD, SKIPPED, WRONG, Finding, Machine
from wan.modules.attention import BACKENDS, choose
from wan.modules.vae import VAES, WanVAE
from wan.planning.plan import dtype_name
from wan.planning.time_estimate import ATTENTION, COPY, DISK, EXCHANGE, MATMUL, PAGEABLE, PINNED, VAE, decode_operations
from wan.utils.accelerator import COLLECTIVES, Accelerator, gpus, synchronize
from wan.utils.progress import quantity

PIECE = 8 << 20  # bytes of one read, about as large as those of the loading code
VAE_ROOM = 12e9  # bytes for the larger of the two timed decodes
EXCHANGE_SECONDS = 90.0


def matmul(machine: Machine) -> Finding:
    """Square matrices in the transformer's usual precision."""
    size = 64 if machine.small else 8192 if machine.is_gpu else 1024
    a, b = (torch.randn(size, size, device=machine.device, dtype=machine.usual) for _ in range(2))
    rate = 2 * size**3 / _seconds(machine, lambda: a @ b)
    return _operations(machine, MATMUL, rate, f"{dtype_name(machine.usual)} {size}x{size}")


def attention(machine: Machine) -> Finding:
    """Self-attention of the 14B network's heads through the back end that `--attention auto` picks."""
    tokens, heads, width = (64, 2, 128) if machine.small else (16384, 40, 128) if machine.is_gpu else (1024, 8, 128)
    name = choose("auto", machine.device, machine.usual, heads, width).name
    q, k, v = (torch.randn(tokens, heads, width, device=machine.device, dtype=machine.usual) for _ in range(3))
    rate = 4 * tokens**2 * heads * width / _seconds(machine, lambda: BACKENDS[name](q, k, v))
    return _operations(machine, ATTENTION, rate, f"{name}, {tokens:,} tokens, {heads} heads of {width}")


def vae(machine: Machine) -> Finding:
    """A decode by Wan2.1's VAE."""
    module, latent = random_vae(machine)
    with torch.inference_mode():
        (seconds,) = interleaved([lambda: [None for _ in module.decode(latent)]], repeats=1)
    rate = decode_operations(module, latent.shape) / seconds
    return _operations(machine, VAE, rate, f"float32, latent {'x'.join(map(str, latent.shape))}")


def random_vae(machine: Machine) -> tuple[WanVAE, torch.Tensor]:
    """Wan2.1's VAE at its released width, with random weights that keep activations near 1, and a latent to decode."""
    kind, shape = VAES[16], (16, 3, 8, 8)
    if machine.small:
        kind, shape = (16, 16, 16, False), (16, 3, 2, 2)
    elif machine.is_gpu:
        shape = (16, 3, 60, 104) if Accelerator(machine.device).free_bytes > VAE_ROOM else (16, 3, 20, 36)
    with torch.device("meta"):
        module = WanVAE(*kind)
    module.requires_grad_(False).to_empty(device=machine.device)
    for parameter in module.parameters():
        parameter.normal_(0, max(parameter[0].numel(), 25) ** -0.5)
    module.use_channels_last()
    return module, torch.randn(shape, device=machine.device)


def device_copy(machine: Machine) -> Finding:
    """Bytes read and bytes written count."""
    size = 1 << 20 if machine.small else 1 << 27
    if machine.is_gpu:
        size = min(1 << 30, Accelerator(machine.device).free_bytes // 8)
    source, target = (torch.ones(size // 4, device=machine.device) for _ in range(2))
    return _bytes(machine, {COPY: 2 * size / _seconds(machine, lambda: target.copy_(source))})


def host_to_device(machine: Machine) -> Finding:
    if not machine.is_gpu:
        return Finding(SKIPPED, f"{machine.device} computes in the host's memory")
    size = 1 << 28
    target = torch.empty(size, dtype=torch.uint8, device=machine.device)
    pageable = torch.ones(size, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    return _bytes(machine, {
        PINNED: size / _seconds(machine, lambda: target.copy_(pinned)),
        PAGEABLE: size / _seconds(machine, lambda: target.copy_(pageable)),
    })  # fmt: skip


def disk_read(machine: Machine) -> Finding:
    """Write a file, drop it from the page cache, read it once from start to end."""
    size = 1 << 20 if machine.small else 1 << 28
    block, buffer = os.urandom(min(size, PIECE)), bytearray(PIECE)
    with tempfile.TemporaryFile(dir=machine.disk, buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        if dropped := hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        seconds = time.perf_counter() - began
    cache = "dropped from the page cache first" if dropped else "perhaps from the page cache"
    return _bytes(machine, {DISK: size / seconds}, f" ({machine.disk}; {cache})")


def interleaved(
    candidates: Sequence[Callable[[], object]],
    repeats: int = 5,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each candidate; they take turns, so that drift of the machine affects all of them alike."""
    times: list[list[float]] = [[] for _ in candidates]
    for turn in range(warm_up + repeats):
        for candidate, series in zip(candidates, times, strict=True):
            synchronize()
            start = clock()
            candidate()
            synchronize()
            if turn >= warm_up:
                series.append(clock() - start)
    return [statistics.median(series) for series in times]


def _seconds(machine: Machine, work: Callable[[], object]) -> float:
    """Seconds of one call; a GPU gets several at a time, so that the wait for it does not count."""
    calls = 10 if machine.is_gpu else 1
    (seconds,) = interleaved([lambda: [work() for _ in range(calls)]], repeats=3)
    return seconds / calls


def _operations(machine: Machine, name: str, rate: float, details: str) -> Finding:
    machine.rates[name] = rate
    return Finding(GOOD, f"{rate / 1e12:.3g} TFLOP/s ({details})", values={name: rate})


def _bytes(machine: Machine, rates: dict[str, float], details: str = "") -> Finding:
    machine.rates |= rates
    parts = [f"{name} {quantity(rate, 'B')}/s" for name, rate in rates.items()]
    return Finding(GOOD, ", ".join(parts) + details, values=dict(rates))


def exchange(machine: Machine, count: int = 0, size: int = 1 << 28) -> Finding:
    """One all-to-all of `size` bytes over all GPUs, a process each, as sequence parallelism makes them.
    count: of processes, if not one for each GPU."""
    from torch.multiprocessing.spawn import spawn

    kind, count = machine.device.type, count or (len(gpus()) if machine.is_gpu else 0)
    if count < 2:
        return Finding(SKIPPED, "fewer than two GPUs: nothing to exchange")
    backend = COLLECTIVES.get(kind, "gloo")
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(_exchange, (count, kind, backend, folder, size), nprocs=count, join=False)
        assert context is not None, "not joined"
        end = time.monotonic() + EXCHANGE_SECONDS
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    return Finding(WRONG, f"{count} processes by {backend} hang", "try NCCL_P2P_DISABLE=1")
        except Exception as e:  # noqa: BLE001 - a process's own words
            last = str(e).strip().splitlines()[-1]
            return Finding(WRONG, f"by {backend} fails: {last}", "NCCL_DEBUG=INFO shows where")
        finally:
            for process in context.processes:
                process.kill()
        rate = size * (count - 1) / count / float(Path(folder, "seconds").read_text())
    machine.rates[EXCHANGE] = rate
    sentence = f"{count} processes by {backend}: all received the right numbers, {quantity(rate, 'B')}/s from each"
    return Finding(GOOD, sentence, values={"processes": count, EXCHANGE: rate})


def _exchange(rank: int, count: int, kind: str, backend: str, folder: str, size: int) -> None:
    import torch.distributed as dist

    device = torch.device(kind)
    if kind in COLLECTIVES:
        device = torch.device(kind, rank)
        Accelerator(device).api.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    numbers = torch.arange(count, device=device).repeat_interleave(1024)
    got = torch.empty_like(numbers)
    dist.all_to_all_single(got, numbers + 1000 * rank)  # to each rank, its number
    if not torch.equal(got, 1000 * numbers + rank):
        raise ValueError(f"process {rank} has received other numbers than were sent")
    mine, got = (torch.ones(count, size // count // 4, device=device) for _ in range(2))
    (seconds,) = interleaved([lambda: dist.all_to_all_single(got, mine)], repeats=3)
    if rank == 0:
        Path(folder, "seconds").write_text(str(seconds))
    dist.destroy_process_group()
