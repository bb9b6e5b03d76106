"""`--cache` on the trained demo: seconds saved and dB lost against a run that computes all 40 guided steps.

python -m benchmarks.step_cache [--videos 8] [--task TASK]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import wan
from benchmarks.demo import FOLDERS, SHAPES, decibels, first_frame, spread
from benchmarks.measure import grid, machine
from examples.shapes.world import Scene, trained
from wan.configs import TASKS
from wan.jobs.job import Sampling
from wan.jobs.weights import both
from wan.sampling import Video

THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2)
CLASSES = {"t2v-A14B": wan.WanT2V, "i2v-A14B": wan.WanI2V}
STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=8, help="for each row, at most 405")
    parser.add_argument("--task", choices=FOLDERS, action="append", help="only this one; default: both")
    args = parser.parse_args()
    print(machine())
    scenes = trained()[:: len(trained()) // args.videos][: args.videos]
    rows = [row for task in args.task or FOLDERS for row in leave_out(task, scenes)]
    heading = (
        "task",
        "--cache",
        "videos",
        f"steps computed of {STEPS}",
        "CPU seconds to the latent",
        "dB to all steps",
    )
    grid(f"{STEPS} guided steps, UniPC; mean +- one standard error", [heading, *rows])


def leave_out(name: str, scenes: Sequence[Scene]) -> Iterator[tuple[str, ...]]:
    """A row for each threshold; the first, 0, computes all steps."""
    whole = list[np.ndarray]()
    for threshold in THRESHOLDS:
        config = replace(TASKS[name], param_dtype="float32", t5_dtype="float32")
        task = CLASSES[name](config, SHAPES / FOLDERS[name], device="cpu", cache=threshold)
        sampling = Sampling("unipc", STEPS, config.sample_shift, both(config.sample_guide_scale))
        computed, videos, spent = list[int](), list[np.ndarray](), 0.0
        for seed, scene in enumerate(scenes):
            image = Image.fromarray(first_frame(scene, seed)) if config.mask_channels else None
            began = time.process_time()
            latent = task.sample_with(
                sampling, Video(scene.caption, config.sample_neg_prompt, (64, 64), 9, seed, image)
            )
            spent += time.process_time() - began
            computed.append(len(task.computed().get("computed_steps", range(STEPS))))
            video = torch.cat(list(task.decode(latent)), dim=1).movedim(0, -1)
            videos.append(((video + 1) * 127.5).round().clamp(0, 255).byte().numpy())
        whole = whole or videos
        near = [decibels(*pair) for pair in zip(videos, whole, strict=True)] if threshold else []
        yield (
            name,
            f"{threshold:g}",
            str(len(scenes)),
            spread(computed),
            f"{spent / len(scenes):.2f}",
            spread(near) if near else "",
        )


if __name__ == "__main__":
    main()
