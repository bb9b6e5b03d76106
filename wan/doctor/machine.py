"""What is there: versions, packages, ffmpeg, devices, and whether several GPUs reach each other."""

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
from wan.doctor.findings import GOOD, SKIPPED, WRONG, Machine, Outcome
from wan.doctor.measure import interleaved
from wan.media.ffmpeg import check_encoder, ffmpeg_command
from wan.planning.device import compute_device
from wan.planning.time_estimate import EXCHANGE
from wan.utils.accelerator import Accelerator, host_bytes
from wan.utils.errors import InputError
from wan.utils.progress import quantity

EXCHANGE_SECONDS = 90.0
DISTRIBUTION = "wan-lightning"
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)")


def versions(machine: Machine) -> Outcome:
    """What a bug report must hold; nothing here is wrong by itself."""
    found = {
        "wan": wan.__version__, "commit": _commit(machine.root), "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda or "none", "driver": _driver(),
        "cudnn": str(torch.backends.cudnn.version() or "none"), "system": platform.platform(),
    }  # fmt: skip
    return Outcome(GOOD, ", ".join(f"{name} {value}" for name, value in found.items()), values=found)


def packages(machine: Machine) -> Outcome:
    """Each package that the program declares, against the lowest version that it declares."""
    bounds = _bounds(machine.root)
    if not bounds:
        return Outcome(SKIPPED, "neither pyproject.toml nor an installed wan-lightning says what is needed")
    found: dict[str, str] = {}
    wrong: list[str] = []
    for name, least in bounds.items():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if _numbers(found[name]) < _numbers(least):
            wrong.append(f"{name} is {found[name]}, at least {least} is needed")
    if wrong:
        needed = " ".join(f"'{name}>={least}'" for name, least in bounds.items() if any(name in w for w in wrong))
        return Outcome(WRONG, "; ".join(wrong), f"pip install {needed}", values=found)
    return Outcome(GOOD, ", ".join(f"{name} {number}" for name, number in found.items()), values=found)


def video_encoder(_: Machine) -> Outcome:
    """The ffmpeg that would write the videos, by encoding a frame."""
    try:
        check_encoder()
    except InputError as e:
        said, advice = str(e).rsplit("; ", 1)
        return Outcome(WRONG, said, advice)
    told = subprocess.run([ffmpeg_command()[0], "-version"], capture_output=True, text=True, timeout=30).stdout
    return Outcome(GOOD, f"ffmpeg {' '.join(told.split()[2:3])} encodes H.264", values={"ffmpeg": ffmpeg_command()[0]})


def choose_device(name: str) -> tuple[torch.device, Outcome]:
    """The device to examine, the CPU where `name` cannot be used; and what there is."""
    try:
        device = compute_device(name)
    except InputError as e:
        return torch.device("cpu"), Outcome(WRONG, str(e), "what follows is of the CPU")
    memory = host_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [f"{device} examined; {_processor()}, {cores} cores, {quantity(memory, 'B')} of host memory can be had"]
    values: dict[str, object] = {"device": str(device), "cores": cores, "host_bytes": memory}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, whole = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        text = f"cuda:{index} {torch.cuda.get_device_name(index)} (compute {major}.{minor}), {free / 1e9:.1f} of "
        parts.append(f"{text}{whole / 1e9:.1f} GB free")
        values[f"cuda:{index}"] = {"free": free, "total": whole, "capability": [major, minor]}
    return device, Outcome(GOOD, "; ".join(parts), values=values)


def exchange(machine: Machine) -> Outcome:
    """One all-to-all, as sequence parallelism makes them, over all GPUs by NCCL, a process each."""
    accelerator = Accelerator(machine.device)
    count = accelerator.api.device_count() if accelerator.has_memory else 0
    if count < 2:
        return Outcome(SKIPPED, "fewer than two GPUs: nothing to exchange")
    outcome = exchange_between(count, "nccl")
    machine.rates |= {name: rate for name, rate in outcome.values.items() if name == EXCHANGE}
    return outcome


def exchange_between(count: int, backend: str, size: int = 1 << 28) -> Outcome:
    """`count` processes exchange what each must have from each other one; then, timed, `size` bytes of each."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        context = spawn(_exchange, (count, backend, folder, size), nprocs=count, join=False)
        assert context is not None, "not joined"
        end = time.monotonic() + EXCHANGE_SECONDS
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    advice = "try NCCL_P2P_DISABLE=1 (broken peer access), and NCCL_DEBUG=INFO to see where it waits"
                    return Outcome(WRONG, f"{count} processes by {backend} hang", advice)
        except Exception as e:  # noqa: BLE001 - a process's own words
            last = str(e).strip().splitlines()[-1]
            return Outcome(WRONG, f"by {backend} fails: {last}", "NCCL_DEBUG=INFO says where; check the driver")
        finally:
            for process in context.processes:
                process.kill()
        rate = size * (count - 1) / count / float(Path(folder, "seconds").read_text())
    told = f"{count} processes by {backend}: each has what the others sent, {quantity(rate, 'B')}/s from each"
    return Outcome(GOOD, told, values={"processes": count, EXCHANGE: rate})


def _exchange(rank: int, count: int, backend: str, folder: str, size: int) -> None:
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    block = 1024
    mine = torch.arange(count, device=device).repeat_interleave(block) + 1000 * rank  # to each, its number
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


def _bounds(root: Path) -> dict[str, str]:
    """Package -> lowest version, as pyproject.toml or the installed package declares it."""
    file = root / "pyproject.toml"
    try:
        if file.is_file():
            declared = tomllib.loads(file.read_text())["project"]["dependencies"]
        else:
            declared = [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
    except (PackageNotFoundError, KeyError):
        return {}
    return {match[1]: match[2] for line in declared if (match := REQUIREMENT.match(line))}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _commit(root: Path) -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def _driver() -> str:
    found = [re.search(r"\d{3,}\.\d[\d.]*", line) for line in _lines("/proc/driver/nvidia/version")]
    return next((match[0] for match in found if match), "none")


def _processor() -> str:
    named = (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.machine())


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
