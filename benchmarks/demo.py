"""The trained demo (examples/shapes): are prompts followed, how near are four steps to forty, is the first frame kept.

python -m benchmarks.demo [--prompts 45] [--task TASK] [--keep FOLDER]

Every figure is read off the mp4 files that generate.py wrote: attributes by examples/shapes/detector.py, distances as
peak signal-to-noise ratios over a whole video. The sets are as large as each other; prompts and seeds are fixed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import generate
from benchmarks.measure import ROOT, grid, machine, rms_error
from examples.shapes.detector import judge
from examples.shapes.world import HELD_OUT, Scene, held_out, render, trained

SHAPES = ROOT / "examples" / "shapes"
FOLDERS = {"t2v-A14B": "Wan2.2-T2V-A14B", "i2v-A14B": "Wan2.2-I2V-A14B"}
LORAS = {"t2v-A14B": SHAPES / "lora-t2v", "i2v-A14B": SHAPES / "lora-i2v"}
ATTRIBUTES = ("colour", "shape", "motion", "ground")
PLAIN = ["--sample_solver", "euler", "--sample_steps", "4", "--sample_shift", "5", "--sample_guide_scale", "1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=45, help="of each set, at most 45")
    parser.add_argument("--task", choices=FOLDERS, action="append", help="only this one; default: both")
    parser.add_argument("--keep", type=Path, help="leave all videos here")
    args = parser.parse_args()
    print(machine())
    known = random.Random(0).sample(trained(), HELD_OUT)
    sets = {"trained": known[: args.prompts], "held out": held_out()[: args.prompts]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        for task in args.task or FOLDERS:
            heading = ("set", "steps", "prompts", *ATTRIBUTES, "all four", "dB to 40 steps", "first frame, dB")
            rows = [heading, *(row for name, scenes in sets.items() for row in follow(task, name, scenes, folder))]
            grid(f"{task}: per cent as asked, +- one standard error", rows)
        rows = [("task", "compared", "rms error of the latents", "dB")]
        rows += [row for task in args.task or FOLDERS for row in compare(task, sets["trained"][:8], folder)]
        grid("the same four-step videos made in another way, 8 prompts, largest rms error, lowest dB", rows)


def follow(task: str, name: str, scenes: Sequence[Scene], folder: Path) -> list[tuple[str, ...]]:
    """A row for each way to sample."""
    ways = {"40 guided": [], "4, LoRA": ["--lora_dir", str(LORAS[task])], "4, plain": PLAIN}
    pictures = [first_frame(scene, number) for number, scene in enumerate(scenes)]
    rows, forty = [], list[np.ndarray]()
    for way, flags in ways.items():
        place = folder / f"{task} {name} {way}".replace(" ", "-").replace(",", "")
        videos = [iio.imread(file, plugin="FFMPEG") for file in make(task, scenes, place, *flags)]
        forty = forty or videos
        right = np.array([agreement(judge(video), scene) for video, scene in zip(videos, scenes, strict=True)])
        shares = [share(column) for column in (*right.T, right.all(1))]
        near = "" if way == "40 guided" else spread([decibels(v, f) for v, f in zip(videos, forty, strict=True)])
        kept = [decibels(video[0], picture) for video, picture in zip(videos, pictures, strict=True)]
        rows.append((name, way, str(len(scenes)), *shares, near, spread(kept) if task == "i2v-A14B" else ""))
    return rows


def make(task: str, scenes: Sequence[Scene], folder: Path, *flags: str) -> list[Path]:
    """One video a scene, by generate.py; those that a folder holds already are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(scenes):
        row: dict[str, object] = {"prompt": scene.caption, "seed": number, "save_file": f"{number:02}.mp4"}
        if task == "i2v-A14B":
            row["image"] = str(folder / f"{number:02}.png")
            Image.fromarray(first_frame(scene, number)).save(folder / f"{number:02}.png")
        rows.append(row)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = generate.main([*command(task, folder), *flags])
    if code:
        raise SystemExit(output.getvalue())
    return [folder / str(row["save_file"]) for row in rows]


def command(task: str, folder: Path) -> list[str]:
    words = ["--task", task, "--ckpt_dir", str(SHAPES / FOLDERS[task]), "--size", "64*64", "--frame_num", "9"]
    words += ["--prompt_file", str(folder / "prompts.jsonl"), "--save_dir", str(folder), "--save_latents", "--resume"]
    return words


def first_frame(scene: Scene, number: int) -> np.ndarray:
    """uint8 [H, W, 3]: a picture of the scene before it moves."""
    frame = render([scene], torch.Generator().manual_seed(number))[0, :, 0]
    picture: np.ndarray = ((frame.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    return picture


def compare(task: str, scenes: Sequence[Scene], folder: Path) -> list[tuple[str, ...]]:
    """bf16 against float32, adapter against merge, two processes against one."""
    lora = ["--lora_dir", str(LORAS[task])]
    base = make(task, scenes, folder / f"{task}-base", *lora)
    ways = {
        "bf16 and float32": make(task, scenes, folder / f"{task}-bf16", *lora, "--dtype", "bf16"),
        "adapter and merge": make(task, scenes, folder / f"{task}-adapter", *lora, "--lora_mode", "adapter"),
        "2 processes and 1": make_in_two(task, scenes, folder / f"{task}-two"),
    }
    rows: list[tuple[str, ...]] = []
    for way, files in ways.items():
        errors = [rms_error(latent(a), latent(b)) for a, b in zip(files, base, strict=True)]
        nearness = [decibels(*(iio.imread(f, plugin="FFMPEG") for f in pair)) for pair in zip(files, base, strict=True)]
        rows.append((task, way, f"{max(errors):.1e}", f"{min(nearness):.1f}"))
    return rows


def make_in_two(task: str, scenes: Sequence[Scene], folder: Path) -> list[Path]:
    """The same by two processes that share each video's heads."""
    make(task, scenes, folder, "--dry_run")  # writes the prompts
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "generate.py"]
    words = [*command(task, folder), "--lora_dir", str(LORAS[task]), "--ulysses_size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *words], check=True, capture_output=True, cwd=ROOT, env=environment)
    return [folder / f"{number:02}.mp4" for number in range(len(scenes))]


def agreement(found: Scene, asked: Scene) -> list[bool]:
    return [getattr(found, name) == getattr(asked, name) for name in ATTRIBUTES]


def latent(video: Path) -> torch.Tensor:
    return load_file(video.with_name(f"{video.stem}.latents.safetensors"))["latent"]


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit frames; nearer than a mean square error of 1 counts as 1, which is 48 dB."""
    error = np.square(found.astype(np.float64) - expected.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1.0)))


def share(right: np.ndarray) -> str:
    p = right.mean()
    return f"{100 * p:.0f} +- {100 * (p * (1 - p) / len(right)) ** 0.5:.1f}"


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} +- {np.std(values) / len(values) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
