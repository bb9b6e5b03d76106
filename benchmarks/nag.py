"""`--nag` on the trained demo at guidance 1: how often clips keep a colour that the negative prompt names.

    python -m benchmarks.nag [--videos 30]

The prompts leave the shape's colour open ("a circle moves left on a white background"). The detector reads the colour
that each video has without NAG; that colour is the negative prompt of the same video, from the same seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

import wan
from benchmarks.demo import ATTRIBUTES, FOLDERS, LORAS, SHAPES, share
from benchmarks.measure import grid, machine
from examples.shapes.detector import judge
from examples.shapes.world import Scene, trained
from wan.configs import TASKS

TASK = "t2v-A14B"
CONFIG = replace(TASKS[TASK], param_dtype="float32", t5_dtype="float32")
SCALES = (1, 2, 5, 11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=30, help="for each row, at most 405")
    count = parser.parse_args().videos
    print(machine())
    scenes = trained()[:: len(trained()) // count][:count]
    rows = [
        ("--nag", "videos", "the colour of --nag 1", *(f"{name} as asked" for name in ATTRIBUTES[1:])),
        *avoid(scenes),
    ]
    grid(f"{TASK}, 4 steps with the LoRA: per cent of the videos that show it, +- one standard error", rows)


def avoid(scenes: Sequence[Scene]) -> Iterator[tuple[str, ...]]:
    """A row for each scale; what the first one shows is avoided by the others."""
    for scale in SCALES:
        task = open_shapes(scale)
        found = [make(task, scene, seed) for seed, scene in enumerate(scenes)]
        if scale == 1:
            scenes = [replace(scene, colour=first.colour) for scene, first in zip(scenes, found, strict=True)]
        pairs = list(zip(found, scenes, strict=True))
        shares = [share(np.array([getattr(f, name) == getattr(s, name) for f, s in pairs])) for name in ATTRIBUTES]
        yield str(scale), str(len(scenes)), *shares


def open_shapes(scale: float) -> wan.WanT2V:
    return wan.WanT2V(CONFIG, SHAPES / FOLDERS[TASK], LORAS[TASK], device="cpu", nag=scale)


def make(task: wan.WanT2V, scene: Scene, seed: int) -> Scene:
    """The detector's reading of this scene's video, its colour left open or avoided."""
    prompt = f"a {scene.shape} {scene.motion} on a {scene.ground} background"
    video = task.generate(prompt, (64, 64), 9, 5.0, "euler", 4, 1.0, n_prompt=scene.colour, seed=seed)
    assert video is not None, "one process makes the video"
    return judge(((video.movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).numpy())


if __name__ == "__main__":
    main()
