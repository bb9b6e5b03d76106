"""The text-to-video set-up of MLPerf inference v6.0 with random weights: seconds per video.

T2V-A14B, 1280x720, 81 frames, 20 steps, guidance 4 (high noise) and 3 (low noise), boundary 0.875; UniPC with the
task's shift. One video after the other, as in its single-stream scenario; the prompts and the VBench scores of the
official run need the released weights and are not part of this.

    python -m benchmarks.mlperf              # a GPU with 80 GB or more; elsewhere the plan of the run
    python -m benchmarks.mlperf --small      # the same steps through small networks, on any machine
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import generate
from benchmarks.full_run import Run, row, write_headers
from benchmarks.measure import report

SETUP = Run("t2v-A14B", "1280*720", 81, steps=20, guidance="3,4", solver="unipc", shift=None)
SMALL = SETUP._replace(size="64*48", frames=9, layers=2, width=64, videos=1)


def dry_run(run: Run) -> None:
    """Print the plan of the run for a GPU with 80 GB."""
    with tempfile.TemporaryDirectory() as folder:
        write_headers(Path(folder), run.task, run.layers, run.width)
        words = ["--task", run.task, "--ckpt_dir", folder, "--size", run.size, "--frame_num", str(run.frames)]
        words += ["--sample_steps", str(run.steps), "--sample_solver", run.solver, "--sample_guide_scale", run.guidance]
        generate.main([*words, "--prompt", "a cat", "--base_seed", "1", "--vram", "80", "--dry_run"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small networks and a small video")
    if parser.parse_args().small:
        report([row("MLPerf set-up, small:", SMALL, "", None)])
    elif torch.cuda.is_available():
        report([row("MLPerf set-up:", SETUP, "", None)])
    else:
        dry_run(SETUP)


if __name__ == "__main__":
    main()
