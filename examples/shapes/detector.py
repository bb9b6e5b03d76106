"""Reads colour, shape, ground and motion off decoded frames. It knows the palette, and nothing of the training.

Shapes: T frames, H rows, W columns. Frames are [T, H, W, 3] with values 0 to 255.
"""

from __future__ import annotations

import numpy as np

from examples.shapes.world import COLOURS, MOTIONS, Scene

NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
SQUARE, CIRCLE = 0.87, 0.66  # how much of its bounding box a shape fills, at least; a triangle fills about half
STILL = 6.0  # pixels: less from the first frame to the last is rest
NONE = "nothing"


def judge(frames: np.ndarray) -> Scene:
    """The attributes that the frames show. An attribute that cannot be read is "nothing"."""
    frames = frames.astype(np.float32)
    border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    away = np.linalg.norm(frames - ground, axis=-1)
    far = np.quantile(away, 0.95)  # a shape covers more than 5 % of the frame; a few stray pixels do not count
    if far < 40:
        return Scene(NONE, NONE, NONE, nearest(ground))
    front = frames[away > 0.75 * far]
    colour = np.median(front, axis=0)
    # how far each pixel is on the way from the ground's colour to the shape's
    way = colour - ground
    cover = np.clip((frames - ground) @ way / (way @ way), 0, 1)
    return Scene(nearest(colour), shape_of(cover), motion_of(cover), nearest(ground))


def nearest(colour: np.ndarray) -> str:
    return NAMES[int(np.linalg.norm(PALETTE - colour, axis=1).argmin())]


def shape_of(cover: np.ndarray) -> str:
    """By the share of the bounding box that is filled, the median over the frames."""
    fills = [fill for frame in cover if (fill := filled(frame)) is not None]
    if not fills:
        return NONE
    fill = float(np.median(fills))
    return "square" if fill > SQUARE else "circle" if fill > CIRCLE else "triangle"


def filled(cover: np.ndarray) -> float | None:
    """Of one frame [H, W]; the box ends where a row or column is nowhere more than half covered."""
    rows, columns = np.flatnonzero(cover.max(1) > 0.5), np.flatnonzero(cover.max(0) > 0.5)
    if not len(rows) or not len(columns):
        return None
    box = cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return float((box > 0.5).mean())


def motion_of(cover: np.ndarray) -> str:
    """By the way of the centre of gravity from the first frame to the last."""
    weight = np.where(cover > 0.5, cover, 0)
    if min(weight[0].sum(), weight[-1].sum()) < 20:
        return NONE
    grid = np.stack(np.meshgrid(np.arange(cover.shape[2]), np.arange(cover.shape[1])), axis=-1)
    start, end = ((frame[..., None] * grid).sum((0, 1)) / frame.sum() for frame in (weight[0], weight[-1]))
    step = end - start
    if np.linalg.norm(step) < STILL:
        return "stays still"
    return max((name for name in MOTIONS if name != "stays still"), key=lambda name: float(step @ MOTIONS[name]))
