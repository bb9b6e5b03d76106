"""The checks of `python -m wan.doctor` and their findings; versions, packages, ffmpeg and devices of this machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import wan
from wan.media.video import check_encoder, ffmpeg_command
from wan.planning.build import compute_device
from wan.utils.accelerator import Accelerator, gpus, host_bytes
from wan.utils.errors import InputError, first_line
from wan.utils.progress import duration, quantity

GOOD, WRONG, SKIPPED = "good", "WRONG", "skipped"
DISTRIBUTION = "wan-lightning"
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)")


@dataclass
class Machine:
    """The machine that the checks examine."""

    device: torch.device
    root: Path  # of the repository, with `examples` and `tests`
    disk: Path  # the folder whose disk is measured
    small: bool = False  # sizes that take milliseconds, for a test of the doctor itself
    rates: dict[str, float] = field(default_factory=dict)  # measured so far, by name, in units per second

    @property
    def is_gpu(self) -> bool:
        return Accelerator(self.device).has_memory

    @property
    def usual(self) -> torch.dtype:
        """The transformer's dtype with `--dtype auto`."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Finding:
    """The result of a check, in a sentence. name, seconds: of the check, added by `examine`."""

    name: str = field(default="", kw_only=True)
    verdict: str
    sentence: str
    seconds: float = field(default=0.0, kw_only=True)
    advice: str = ""  # what to do if it is wrong
    values: dict[str, Any] = field(default_factory=dict)  # its numbers, for `--json`

    def line(self) -> str:
        """The finding, with the lines of its table below it."""
        sentence, newline, below = self.sentence.partition("\n")
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.verdict:<7}  {self.name} ({duration(self.seconds)}): {sentence}{advice}{newline}{below}"


class DoctorCheck(NamedTuple):
    name: str
    run: Callable[[Machine], Finding]
    advice: str = "put this report into a bug report"  # what to do if `run` raises


def examine(check: DoctorCheck, machine: Machine) -> Finding:
    """Run the check; one that fails is a finding, too, and stops no other."""
    began = time.perf_counter()
    try:
        found = check.run(machine)
    except Exception as e:  # noqa: BLE001 - drivers, kernels and foreign packages fail with any exception
        found = Finding(WRONG, f"fails with {type(e).__name__}: {first_line(e)}", check.advice)
    return replace(found, name=check.name, seconds=time.perf_counter() - began)


def software(machine: Machine) -> Finding:
    """The versions that a bug report needs; none is wrong by itself."""
    commit = ""
    with suppress(OSError):  # no git
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, cwd=machine.root, capture_output=True, text=True).stdout.strip()
    found = {
        "wan": wan.__version__, "commit": commit or "unknown", "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda or "none",
        "driver": _search(r"\d{3,}\.\d[\d.]*", "/proc/driver/nvidia/version") or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"), "system": platform.platform(),
    }  # fmt: skip
    return Finding(GOOD, ", ".join(f"{name} {value}" for name, value in found.items()), values=found)


def packages(machine: Machine) -> Finding:
    """Each package that the program declares, against the lowest version that it declares."""
    project = machine.root / "pyproject.toml"
    try:
        if project.is_file():
            declared = tomllib.loads(project.read_text())["project"]["dependencies"]
        else:
            declared = [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
    except (PackageNotFoundError, KeyError):
        return Finding(SKIPPED, f"neither pyproject.toml nor an installed {DISTRIBUTION} declares any")
    found, wrong = dict[str, str](), dict[str, str]()  # wrong: what to install -> why
    for name, least in (match.groups() for line in declared if (match := REQUIREMENT.match(line))):
        try:
            found[name] = version(name)
            have, need = (list(map(int, re.findall(r"\d+", v.partition("+")[0])[:3])) for v in (found[name], least))
            if have < need:
                wrong[f"'{name}>={least}'"] = f"{name} is {found[name]}, at least {least} is needed"
        except PackageNotFoundError:
            wrong[f"'{name}>={least}'"] = f"{name} is not installed"
    if wrong:
        return Finding(WRONG, "; ".join(wrong.values()), f"pip install {' '.join(wrong)}", found)
    return Finding(GOOD, ", ".join(f"{name} {number}" for name, number in found.items()), values=found)


def video_encoder(_: Machine) -> Finding:
    """Encode a frame with the ffmpeg that writes the videos."""
    try:
        check_encoder()
    except InputError as e:
        problem, advice = str(e).rsplit("; ", 1)
        return Finding(WRONG, problem, advice)
    ffmpeg = ffmpeg_command()[0]
    words = subprocess.run([ffmpeg, "-version"], capture_output=True, text=True, timeout=30).stdout.split()
    return Finding(GOOD, f"ffmpeg {' '.join(words[2:3])} encodes H.264", values={"ffmpeg": ffmpeg})


def devices(name: str, machine: Machine) -> Finding:
    """Choose the device to examine, the CPU if `name` cannot be used; a list of the machine's devices."""
    try:
        machine.device = compute_device(name)
    except InputError as e:
        return Finding(WRONG, str(e), "the checks below examine the CPU")
    memory = host_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor = _search(r"(?<=^model name\t: ).*", "/proc/cpuinfo") or platform.machine()
    parts = [f"{machine.device} examined; {processor}, {cores} cores, {quantity(memory, 'B')} of host memory available"]
    values: dict[str, object] = {"device": str(machine.device), "cores": cores, "host_bytes": memory}
    for gpu in gpus():
        (free, whole), capability = gpu.api.mem_get_info(gpu.device), gpu.capability
        compute = f" (compute {capability[0]}.{capability[1]})" if capability else ""
        parts.append(f"{gpu.device} {gpu.name}{compute}, {free / 1e9:.1f} of {whole / 1e9:.1f} GB free")
        values[str(gpu.device)] = {"free": free, "total": whole, "capability": capability}
    return Finding(GOOD, "; ".join(parts), values=values)


def _search(pattern: str, path: str) -> str:
    found = re.search(pattern, Path(path).read_text() if Path(path).exists() else "", re.MULTILINE)
    return found[0] if found else ""
