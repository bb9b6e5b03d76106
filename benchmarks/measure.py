"""What every benchmark prints and how it measures: the machine, interleaved medians, one table."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from wan.doctor.findings import table as aligned
from wan.doctor.measure import interleaved as interleaved
from wan.doctor.measure import rms_error as rms_error
from wan.doctor.measure import synchronize as synchronize

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """One line: date, commit, hardware, versions. It stands beside every number."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip() or 'unknown'}, {cpu}, "
        f"{torch.get_num_threads()} threads{gpu}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print aligned rows; the first is the heading."""
    print(f"\n{title}")
    for line in aligned(rows):
        print(f"  {line}")


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights of normal scale, in place: zeros run faster than real ones and hide errors."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 25
        mean = 1.0 if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma")) else 0.0
        parameter.data.normal_(mean, fan**-0.5, generator=generator)
        parameter.requires_grad_(False)
