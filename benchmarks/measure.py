"""What every benchmark prints and how it measures: the machine, interleaved medians, one form of table."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

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


class Row(NamedTuple):
    """One measured thing, by its name in the ladder (C1, G4, ...): our figure, the level asked for, a peer's figure."""

    what: str
    figure: str
    limit: str = ""
    peer: str = ""


NEEDS_A_GPU = "needs a GPU"


def report(rows: Sequence[Row]) -> None:
    """The one place that prints results: a section that can be pasted into RESULTS.md as it is."""
    print(f"\n## {machine()}\n\nCommand: `python {' '.join(sys.orig_argv[1:])}`\n")
    print("| what | limit or goal | peer | ours |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join((row.what, row.limit, row.peer, row.figure)) + " |")


def grid(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table of other columns; the first row is the heading."""
    head, *body = rows
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(row) + " |")


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights of normal scale, in place: zeros run faster than real ones and hide errors."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 25
        mean = 1.0 if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma")) else 0.0
        parameter.data.normal_(mean, fan**-0.5, generator=generator)
        parameter.requires_grad_(False)
