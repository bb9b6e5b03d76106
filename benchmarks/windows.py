"""Seams of a video made in windows: how much neighbouring frames differ there and inside.

    python -m benchmarks.windows

Mean absolute difference of neighbouring frames, in steps of 0 to 255, on the trained demo's T2V with its 4-step LoRA. A
seam is a step to, within or from the frames of a latent frame that two windows share.
"""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

import generate
from benchmarks.measure import ROOT, grid, machine
from examples.shapes.world import trained
from wan.cli.options import Request
from wan.jobs.job import windows_of
from wan.media.video import read_clip

SHAPES = ROOT / "examples" / "shapes"
FRAMES, WINDOW, VIDEOS = 33, 9, 12
FLAGS = ["--task", "t2v-A14B", "--ckpt_dir", str(SHAPES / "Wan2.2-T2V-A14B"), "--lora_dir", str(SHAPES / "lora-t2v"),
         "--size", "64*64", "--frame_num", str(FRAMES), "--device", "cpu", "--base_seed", "1"]  # fmt: skip


def seams() -> set[int]:
    """Differences by their second frame."""
    windows = windows_of(FRAMES, Request(window=str(WINDOW)).windows)
    shared = {k for one, two in pairwise(windows) for k in range(two[0], one[1])}
    return {frame for k in shared for frame in range(4 * k - 3, 4 * k + 2)}


def differences(file: Path) -> np.ndarray:
    """[F - 1]."""
    frames = read_clip(file, FRAMES, 16, (64, 64)).numpy()
    return np.abs(np.diff(frames, axis=1)).mean(axis=(0, 2, 3)) * 127.5


def row(name: str, folder: Path, *flags: str) -> list[str]:
    prompts = [json.dumps({"prompt": scene.caption}) for scene in trained()[7::30][:VIDEOS]]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    words = ["--prompt_file", str(folder / "prompts.jsonl"), "--save_dir", str(folder / name)]
    assert generate.main([*FLAGS, *words, *flags]) == 0, "the demo runs"
    found = np.stack([differences(file) for file in sorted((folder / name).glob("*.mp4"))])
    at = np.isin(np.arange(1, FRAMES), list(seams()))
    values = [found[:, at].mean(1), found[:, ~at].mean(1), found[:, at].mean(1) - found[:, ~at].mean(1)]
    return [name, *(f"{v.mean():.2f} ± {v.std(ddof=1) / len(v) ** 0.5:.2f}" for v in values)]


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        rows = [["made", "at seams", "inside", "seam - inside, by video"]]
        rows.append(row("windows of 9 frames", Path(folder), "--window", str(WINDOW)))
        rows.append(row("33 frames at once", Path(folder)))
    grid(f"Neighbouring frames of {FRAMES}, {VIDEOS} videos (mean ± standard error)", rows)


if __name__ == "__main__":
    main()
