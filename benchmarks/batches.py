"""Batches of thousands: a dry run whose rows have sizes of their own, and `--resume` over whole videos, CPU seconds.

python -m benchmarks.batches [--rows 10000] [--repeats 3]
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_run import write_headers
from benchmarks.measure import ROOT, Row, command_parser, report
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.media.video import VideoWriter
from wan.planning.build import make_plan
from wan.runner.record import describe, outcome

SIZES = [f"{16 * width}*{16 * height}" for width in range(4, 41) for height in range(4, 44)]
TINY = ROOT / "examples" / "tiny"
SMALL = {"lora_dir": str(TINY / "lora-t2v"), "size": "64*64", "frame_num": 5}


def seconds(repeats: int, **flags: object) -> str:
    """Median CPU seconds of `generate.py`, its children's too, and their spread."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value)) if word]
    taken = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, ROOT / "generate.py", *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return f"{statistics.median(taken):.1f} s ({min(taken):.1f} to {max(taken):.1f})"


def write_videos(flags: dict[str, Any]) -> None:
    """Every video of a plan, whole: one file with the record of each, blanks behind the JSON of the shorter ones."""
    asked = resolve(flags)
    assert isinstance(asked, Generate)
    plan, data, first = make_plan(asked, Runtime()), b"", b""
    Path(flags["save_dir"]).mkdir()
    for job in plan.jobs:
        record = describe(plan, job, {}) | outcome(job.save_file, 5, (64, 64), 16)
        if not data:
            longer = record | {"blank": " " * 50}
            with VideoWriter(job.save_file, 16) as video:
                video.write(torch.zeros(3, 5, 64, 64))
                video.finish(longer)
            data, first = job.save_file.read_bytes(), json.dumps(longer, ensure_ascii=False).encode()
        text = json.dumps(record, ensure_ascii=False).encode()
        job.save_file.write_bytes(data.replace(first, text.ljust(len(first))))
        job.save_file.with_suffix(".json").write_bytes(text)


def rows(count: int = 10_000, repeats: int = 3) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = [{"prompt": f"a cat, take {n:05d}", "size": SIZES[n % len(SIZES)]} for n in range(count)]
        (folder / "own.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in prompts))
        (folder / "all.txt").write_text("".join(f"{row['prompt']}\n" for row in prompts))
        write_headers(folder / "released", "t2v-A14B", None, None)
        base = {"device": "cpu", "base_seed": 5, "save_dir": str(folder / "out")}
        whole = base | SMALL | {"ckpt_dir": str(TINY / "Wan2.2-T2V-A14B"), "prompt_file": str(folder / "all.txt")}
        write_videos(whole)
        dry = base | {"ckpt_dir": str(folder / "released"), "prompt_file": str(folder / "own.jsonl"), "ignore_disk": ""}
        dry["save_dir"] = str(folder / "none")
        return [
            Row(f"plan of {count:,} rows in {len(SIZES):,} sizes, T2V-A14B's headers: `--dry_run`, CPU seconds",
                seconds(repeats, **dry, dry_run=""), "5 s"),
            Row(f"`--resume` over {count:,} whole videos, CPU seconds", seconds(repeats, **whole, resume=""), "20 s"),
        ]  # fmt: skip


def main() -> None:
    parser = command_parser(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=10_000)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    report(rows(given.rows, given.repeats))


if __name__ == "__main__":
    main()
