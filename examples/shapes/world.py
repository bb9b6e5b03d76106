"""The world that the small Wan knows: one coloured shape on a coloured ground, at rest or moving in a straight line.

Shapes: B clips, T frames, H rows, W columns. Clips are [B, 3, T, H, W] in [-1, 1].
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

FRAMES, SIDE = 9, 64
COLOURS = {
    "red": (228, 40, 48),
    "yellow": (255, 208, 40),
    "green": (44, 168, 84),
    "blue": (32, 96, 232),
    "purple": (140, 52, 190),
    "white": (246, 246, 242),
}
SHAPES = ("circle", "square", "triangle")
# what a caption calls the motion, and where it leads: columns to the right, rows down
MOTIONS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stays still": (0, 0),
}
TRAVEL = 20.0  # pixels from the first frame to the last
RADIUS = (13.0, 16.0)
WANDER = 3.0  # how far from the centre the middle of the path lies, at most, on each axis
HELD_OUT = 45  # combinations that no training clip shows


@dataclass(frozen=True, order=True)
class Scene:
    """The content of a clip; position and size are left open."""

    colour: str
    shape: str
    motion: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} on a {self.ground} background"


def scenes() -> list[Scene]:
    """All 450: a shape never has the colour of its ground."""
    names = product(COLOURS, SHAPES, MOTIONS, COLOURS)
    return [Scene(*four) for four in names if four[0] != four[3]]


def held_out() -> list[Scene]:
    """The combinations kept from training; each of their words, and most pairs of words, are trained on elsewhere."""
    return random.Random(12).sample(scenes(), HELD_OUT)


def trained() -> list[Scene]:
    kept = set(held_out())
    return [scene for scene in scenes() if scene not in kept]


def draw(count: int, generator: torch.Generator) -> list[Scene]:
    """Scenes to train on, at random."""
    known = trained()
    return [known[i] for i in torch.randint(len(known), (count,), generator=generator).tolist()]


def render(shown: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """A clip of each scene, with a size and a path of its own: [B, 3, T, H, W]."""
    count = len(shown)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(count, generator=generator)
    middle = SIDE / 2 + WANDER * (2 * torch.rand(count, 2, generator=generator) - 1)
    heading = torch.tensor([MOTIONS[scene.motion] for scene in shown], dtype=torch.float32)
    along = torch.linspace(-0.5, 0.5, FRAMES) * TRAVEL
    centre = middle[:, None] + along[:, None] * heading[:, None]  # [B, T, 2]: column, row

    pixel = torch.arange(SIDE) + 0.5
    x = pixel - centre[..., 0, None]  # [B, T, W]
    y = pixel - centre[..., 1, None]
    cover = torch.stack([coverage(s.shape, x[i], y[i], radius[i]) for i, s in enumerate(shown)])[:, None]
    front = palette([scene.colour for scene in shown])
    back = palette([scene.ground for scene in shown])
    return back + cover * (front - back)


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel the shape covers: x [T, W] and y [T, H] from its centre -> [T, H, W] in [0, 1].

    A signed distance with a ramp one pixel wide, which is what smooths the edges. All shapes are about as large.
    """
    x, y = x[:, None, :], y[:, :, None]
    if shape == "circle":
        inside = radius - (x.square() + y.square()).sqrt()
    elif shape == "square":
        inside = 0.9 * radius - torch.maximum(x.abs().expand(-1, SIDE, -1), y.abs().expand(-1, -1, SIDE))
    else:  # upright, equal sides, as high above its centre as below
        height = 1.9 * radius
        sides = (y + height / 2) * 0.5 - x.abs() * 0.75**0.5
        inside = torch.minimum(sides, (height / 2 - y).expand(-1, -1, SIDE))
    return (inside + 0.5).clamp(0, 1)


def palette(names: Sequence[str]) -> Tensor:
    """[B, 3, 1, 1, 1] in [-1, 1]."""
    return torch.tensor([COLOURS[name] for name in names])[:, :, None, None, None] / 127.5 - 1
