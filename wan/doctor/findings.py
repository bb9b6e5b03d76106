"""Checks and their findings. Each check runs by itself: one that fails is a finding, too, and stops no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wan.utils.errors import one_line
from wan.utils.progress import duration

GOOD, WRONG, SKIPPED = "good", "WRONG", "skipped"


@dataclass(frozen=True)
class CheckOutcome:
    """The result of a check, in a sentence. advice: what to do if it is wrong. values: its numbers, for `--json`."""

    verdict: str
    sentence: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Machine:
    """The machine that the checks examine.

    root: of the repository, with `examples` and `tests`. disk: the folder whose disk is measured. small: sizes that
    take milliseconds, for a test of the doctor itself. rates: measured so far, by name, in units per second.
    """

    device: torch.device
    root: Path
    disk: Path
    small: bool = False
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def usual(self) -> torch.dtype:
        """The transformer's dtype with `--dtype auto`."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


class DoctorCheck(NamedTuple):
    """advice: what to do if `run` raises."""

    name: str
    run: Callable[[Machine], CheckOutcome]
    advice: str = "put this report into a bug report"


@dataclass(frozen=True)
class Finding:
    name: str
    verdict: str
    sentence: str
    seconds: float
    advice: str
    values: dict[str, Any]

    def line(self) -> str:
        """The finding, with the lines of its table below it."""
        sentence, newline, below = self.sentence.partition("\n")
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.verdict:<7}  {self.name} ({duration(self.seconds)}): {sentence}{advice}{newline}{below}"


def examine(check: DoctorCheck, machine: Machine) -> Finding:
    """Run the check; whatever it raises is a finding."""
    began = time.perf_counter()
    try:
        outcome = check.run(machine)
    except Exception as e:  # noqa: BLE001 - drivers, kernels and foreign packages fail with any exception
        outcome = CheckOutcome(WRONG, f"fails with {one_line(e, 300)}", check.advice)
    spent = time.perf_counter() - began
    return Finding(check.name, outcome.verdict, outcome.sentence, spent, outcome.advice, outcome.values)


def within(name: str, error: float, limit: float, advice: str, least: float = 0.0) -> CheckOutcome:
    """The verdict on an error that must be between `least` and `limit`; NaN is wrong."""
    good = least <= error <= limit
    allowed = f"{least:g} to {limit:g}" if least else f"at most {limit:g}"
    values = {"error": error, "least": least, "limit": limit}
    return CheckOutcome(
        GOOD if good else WRONG, f"{name} {error:.1e}, allowed {allowed}", "" if good else advice, values
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")
