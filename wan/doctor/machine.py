"""What the machine has: versions, packages, ffmpeg, devices, and whether several GPUs reach each other."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
import time
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

import wan
from wan.doctor.findings import GOOD, SKIPPED, WRONG, CheckOutcome, Machine
from wan.doctor.measure import interleaved
from wan.media.ffmpeg import check_encoder, ffmpeg_command
from wan.planning.device import compute_device
from wan.planning.time_estimate import EXCHANGE
from wan.utils.accelerator import COLLECTIVES, Accelerator, gpus, host_bytes
from wan.utils.errors import InputError
from wan.utils.progress import quantity

EXCHANGE_SECONDS = 90.0
DISTRIBUTION = "wan-lightning"
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)")


def versions_check(machine: Machine) -> CheckOutcome:
    """The versions that a bug report needs; none is wrong by itself."""
    driver = next((match[0] for line in _lines("/proc/driver/nvidia/version")
                   if (match := re.search(r"\d{3,}\.\d[\d.]*", line))), "none")  # fmt: skip
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=machine.root, capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # no git
        commit = ""
    found = {
        "wan": wan.__version__, "commit": commit or "unknown", "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda or "none", "driver": driver,
        "cudnn": str(torch.backends.cudnn.version() or "none"), "system": platform.platform(),
    }  # fmt: skip
    return CheckOutcome(GOOD, ", ".join(f"{name} {value}" for name, value in found.items()), values=found)


def packages(machine: Machine) -> CheckOutcome:
    """Each package that the program declares, against the lowest version that it declares."""
    project = machine.root / "pyproject.toml"
    try:
        declared = (
            tomllib.loads(project.read_text())["project"]["dependencies"]
            if project.is_file()
            else [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
        )
    except (PackageNotFoundError, KeyError):
        return CheckOutcome(SKIPPED, f"neither pyproject.toml nor an installed {DISTRIBUTION} declares any")
    found, wrong, needed = dict[str, str](), list[str](), list[str]()
    for name, least in (match.groups() for line in declared if (match := REQUIREMENT.match(line))):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
        else:
            if _numbers(found[name]) >= _numbers(least):
                continue
            wrong.append(f"{name} is {found[name]}, at least {least} is needed")
        needed.append(f"'{name}>={least}'")
    if wrong:
        return CheckOutcome(WRONG, "; ".join(wrong), f"pip install {' '.join(needed)}", values=found)
    return CheckOutcome(GOOD, ", ".join(f"{name} {number}" for name, number in found.items()), values=found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def video_encoder(_: Machine) -> CheckOutcome:
    """Encode a frame with the ffmpeg that writes the videos."""
    try:
        check_encoder()
    except InputError as e:
        problem, advice = str(e).rsplit("; ", 1)
        return CheckOutcome(WRONG, problem, advice)
    ffmpeg = ffmpeg_command()[0]
    words = subprocess.run([ffmpeg, "-version"], capture_output=True, text=True, timeout=30).stdout.split()
    return CheckOutcome(GOOD, f"ffmpeg {' '.join(words[2:3])} encodes H.264", values={"ffmpeg": ffmpeg})


def choose_device(name: str) -> tuple[torch.device, CheckOutcome]:
    """The device to examine (the CPU if `name` cannot be used), and a list of the machine's devices."""
    try:
        device = compute_device(name)
    except InputError as e:
        return torch.device("cpu"), CheckOutcome(WRONG, str(e), "the checks below examine the CPU")
    memory = host_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    parts = [f"{device} examined; {processor}, {cores} cores, {quantity(memory, 'B')} of host memory available"]
    values: dict[str, object] = {"device": str(device), "cores": cores, "host_bytes": memory}
    for gpu in gpus():
        (free, whole), capability = gpu.api.mem_get_info(gpu.device), gpu.capability
        compute = f" (compute {capability[0]}.{capability[1]})" if capability else ""
        parts.append(f"{gpu.device} {gpu.name}{compute}, {free / 1e9:.1f} of {whole / 1e9:.1f} GB free")
        values[str(gpu.device)] = {"free": free, "total": whole, "capability": capability}
    return device, CheckOutcome(GOOD, "; ".join(parts), values=values)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def exchange(machine: Machine) -> CheckOutcome:
    """One all-to-all over all GPUs, a process each, as sequence parallelism makes them."""
    count = len(gpus()) if Accelerator(machine.device).has_memory else 0
    if count < 2:
        return CheckOutcome(SKIPPED, "fewer than two GPUs: nothing to exchange")
    outcome = exchange_between(count, machine.device.type)
    machine.rates |= {name: rate for name, rate in outcome.values.items() if name == EXCHANGE}
    return outcome


def exchange_between(count: int, kind: str, size: int = 1 << 28) -> CheckOutcome:
    """`count` processes on devices of a kind exchange distinct numbers; then, timed, `size` bytes each."""
    from torch.multiprocessing.spawn import spawn

    backend = COLLECTIVES.get(kind, "gloo")
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(_exchange, (count, kind, folder, size), nprocs=count, join=False)
        assert context is not None, "not joined"
        end = time.monotonic() + EXCHANGE_SECONDS
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    advice = "try NCCL_P2P_DISABLE=1 (broken peer access); NCCL_DEBUG=INFO shows where it waits"
                    return CheckOutcome(WRONG, f"{count} processes by {backend} hang", advice)
        except Exception as e:  # noqa: BLE001 - a process's own words
            last = str(e).strip().splitlines()[-1]
            return CheckOutcome(WRONG, f"by {backend} fails: {last}", "NCCL_DEBUG=INFO shows where; check the driver")
        finally:
            for process in context.processes:
                process.kill()
        rate = size * (count - 1) / count / float(Path(folder, "seconds").read_text())
    sentence = f"{count} processes by {backend}: all received the right numbers, {quantity(rate, 'B')}/s from each"
    return CheckOutcome(GOOD, sentence, values={"processes": count, EXCHANGE: rate})


def _exchange(rank: int, count: int, kind: str, folder: str, size: int) -> None:
    import torch.distributed as dist

    device = torch.device(kind)
    if kind in COLLECTIVES:
        device = torch.device(kind, rank)
        Accelerator(device).api.set_device(device)
    backend = COLLECTIVES.get(kind, "gloo")
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    block = 1024
    mine = torch.arange(count, device=device).repeat_interleave(block) + 1000 * rank  # to each rank, its number
    got = torch.empty_like(mine)
    dist.all_to_all_single(got, mine)
    expected = 1000 * torch.arange(count, device=device).repeat_interleave(block) + rank
    if not torch.equal(got, expected):
        raise ValueError(f"process {rank} has received other numbers than were sent")
    mine, got = (torch.ones(count, size // count // 4, device=device) for _ in range(2))
    (seconds,) = interleaved([lambda: dist.all_to_all_single(got, mine)], repeats=3)
    if rank == 0:
        Path(folder, "seconds").write_text(str(seconds))
    dist.destroy_process_group()
