"""Shared by benchmarks: the machine's line, interleaved medians, one form of table."""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from wan.doctor.numerics import rms_error as rms_error
from wan.doctor.rates import interleaved as interleaved
from wan.utils.accelerator import free_memory
from wan.utils.accelerator import synchronize as synchronize

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """One line: date, commit, hardware, versions. It goes with every number."""
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


def run(works: Mapping[str, Callable[[], list[Row]]], keep: Path | None = None, seconds: float = math.inf) -> int:
    """Do each work, whose name says what it measures, and report the rows of all; how many failed or were not begun.

    keep: gets each work's rows as soon as they are there. Rows of this machine and commit are not measured again, so
    a run that was killed goes on where it stopped. After `seconds` no further work is begun.
    """
    here, end = machine().partition(", ")[2], time.perf_counter() + seconds
    done = {name: rows for name, rows in _kept(keep, here) if name in works} if keep else {}
    for name, work in works.items():
        if name in done or time.perf_counter() > end:
            continue
        began = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            done[name] = work()
        except Exception:  # noqa: BLE001 - one work must not cost the others their figures
            traceback.print_exc()
        else:
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            if keep:
                keep.parent.mkdir(parents=True, exist_ok=True)
                with keep.open("a", encoding="utf-8") as file:
                    entry = json.dumps({"machine": here, "work": name, "rows": done[name]})
                    file.write(f"\n{entry}\n")  # the line before may have been cut off
        free_memory()  # the next one may want all of a GPU
    report([row for name in works for row in done.get(name, ())])
    if missing := [name for name in works if name not in done]:
        print(f"not measured: {'; '.join(missing)}", file=sys.stderr)
    return len(missing)


def _kept(file: Path, here: str) -> Iterator[tuple[str, list[Row]]]:
    """(work, its rows) for each whole line of `file` that was written on this machine."""
    for line in _lines(str(file)):
        with suppress(ValueError):  # killed while it was written
            entry = json.loads(line)
            if entry["machine"] == here:
                yield entry["work"], [Row(*row) for row in entry["rows"]]


def command_parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """The parser of a benchmark's command line, with `--repeats`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of which the median is taken")
    return parser


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
