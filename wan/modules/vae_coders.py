"""The two halves of the video autoencoders, their levels, and the regions of a frame they can run for.

Shapes: T frames, H rows, W columns, C channels, always [T, H, W, C]. Encoder levels halve H and W (all but the last),
decoder levels double them; two levels of each also change the frame rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wan.modules.causal_conv import (
    AverageShortcut,
    ClipState,
    Downsample,
    FrameAttention,
    Level,
    RepeatShortcut,
    ResidualBlock,
    RMSNorm,
    Upsample,
    convolve,
    copy,
    join_history,
)

WIDTHS = (1, 2, 4, 4)  # of the encoder's levels, in multiples of the first; the decoder's in reverse
HALVES_TIME = (1, 2)  # encoder levels
DOUBLES_TIME = (0, 1)  # decoder levels
DECODER_RIM = (13, 12, 10, 7)  # cells of a level's own grid that influence a region from outside it
ENCODER_RIM = (8, 9)  # latent cells before and after; strided convolutions pad the far side only


class Coder(nn.Module):
    """What encoder and decoder have in common: the first convolution, the middle, the head."""

    def __init__(self, channels: int, first: int, middle: int, last: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, first, 3, padding=(0, 1, 1))
        self.middle = nn.ModuleList(
            [ResidualBlock(middle, middle), FrameAttention(middle), ResidualBlock(middle, middle)]
        )
        self.last = RMSNorm(last, axes=3), nn.Conv3d(last, out_channels, 3, padding=(0, 1, 1))
        self.head = nn.ModuleDict({"0": self.last[0], "2": self.last[1]})

    def run_first(self, x: Tensor, state: ClipState) -> Tensor:
        return convolve(self.conv1, join_history(self.conv1, x, state, copy))

    def run_middle(self, x: Tensor, state: ClipState) -> Tensor:
        before, attention, after = self.middle
        return after(attention(before(x, state)), state)

    def run_head(self, x: Tensor, state: ClipState) -> Tensor:
        norm, conv = self.last
        return convolve(conv, join_history(conv, x, state, norm.activate))


class Encoder(Coder):
    """[T, H, W, C] pixels -> [L, H/8, W/8, out_channels]: mean and log-variance of the latent."""

    def __init__(self, channels: int, width: int, out_channels: int, nested: bool) -> None:
        widths = [width * multiple for multiple in (1, *WIDTHS)]
        super().__init__(channels, widths[0], widths[-1], widths[-1], out_channels)
        self.levels = []
        for index, (before, after) in enumerate(pairwise(widths)):
            layers: list[nn.Module] = [ResidualBlock(before, after), ResidualBlock(after, after)]
            in_time, last = index in HALVES_TIME, index == 3
            if not last:
                layers.append(Downsample(after, in_time))
            shortcut = AverageShortcut(frames=2 if in_time else 1, space=1 if last else 2) if nested else None
            self.levels.append(Level(layers, shortcut))
        self.downsamples = register(self.levels, "downsamples", nested)

    def stages(self, state: ClipState) -> list[CoderStage]:
        """All that comes before the middle."""
        stages = [CoderStage(partial(self.run_first, state=state), convolutions=1, halves_time=False)]
        for index, level in enumerate(self.levels):
            stages.append(CoderStage(partial(level, state=state), convolutions=4, halves_time=index in HALVES_TIME))
        return stages

    def finish(self, x: Tensor, state: ClipState) -> Tensor:
        return self.run_head(self.run_middle(x, state), state)


class Decoder(Coder):
    """[L, h, w, z] latents -> [T, 8h, 8w, out_channels] pixels."""

    def __init__(self, z_dim: int, width: int, out_channels: int, nested: bool) -> None:
        widths = [width * multiple for multiple in reversed(WIDTHS)]
        super().__init__(z_dim, widths[0], widths[0], widths[-1], out_channels)
        self.levels = []
        before = widths[0]
        for index, after in enumerate(widths):
            layers: list[nn.Module] = [ResidualBlock(before, after)]
            layers += [ResidualBlock(after, after), ResidualBlock(after, after)]
            in_time, last = index in DOUBLES_TIME, index == 3
            before = after if nested else after // 2  # Wan2.1's upsampling halves the channels
            if not last:
                layers.append(Upsample(after, before, in_time))
            shortcut = RepeatShortcut(frames=2 if in_time else 1) if nested and not last else None
            self.levels.append(Level(layers, shortcut))
        self.upsamples = register(self.levels, "upsamples", nested)

    def start(self, x: Tensor, state: ClipState) -> Tensor:
        """All that needs whole frames."""
        return self.run_middle(self.run_first(x, state), state)

    def finish(self, x: Tensor, region: Region, state: ClipState) -> Tensor:
        """From whole frames of the latent grid to the region's pixels. Each level takes in the region and its rim; what
        its convolutions get wrong beyond an inner edge is cut off before it can reach the region."""
        frame = window = Region(0, x.shape[1], 0, x.shape[2])
        for level, rim in zip(self.levels, DECODER_RIM, strict=True):
            wanted = region.grown(rim, rim, frame)
            height = wanted.bottom - wanted.top
            x = level(wanted.cut(x, window), state)
            scale = x.shape[1] // height
            region, frame, window = region.scaled(scale), frame.scaled(scale), wanted.scaled(scale)
        return region.cut(self.run_head(x, state), window)

    def peak(self, grid: tuple[int, int], regions: Sequence[Region], chunk: int) -> int:
        """Numbers alive at once, at most, while `finish` runs for the largest region of a latent grid, chunk by chunk.

        A level holds its input, a residual block's input, what comes out of its first convolution, the second's buffer
        with two frames of history, and the two that the next chunk will need beside those; every convolution of every
        level keeps two frames from chunk to chunk. taken: cells of a level's input, with the rim of the level before.
        """
        frame, factor, frames, kept, taken = Region(0, grid[0], 0, grid[1]), 1, chunk, 0, 0
        transient: list[int] = []
        for level, rim in zip(self.levels, DECODER_RIM, strict=True):
            area = max(region.scaled(factor).grown(rim, rim, frame.scaled(factor)).area for region in regions)
            block, last = level.layers[0], level.layers[-1]
            assert isinstance(block, ResidualBlock)
            before, width = block.channels
            taken = max(taken, area)
            transient.append(taken * frames * before + area * (3 * frames + 4) * width)
            if block.shortcut is not None:  # a GPU's product copies an input of which the rim was cut off
                copied = before if taken > area else 0
                transient.append(frames * (taken * before + area * (copied + 2 * width)))
            kept += area * 2 * (before + 5 * width)
            if isinstance(last, Upsample):
                rate = 2 if last.time_conv else 1
                kept += area * 2 * width * (rate - 1) + 16 * width * last.out_channels  # and the doubling kernel
                frames, factor = frames * rate, 2 * factor
                inside = area * (width + rate * (width + 4 * last.out_channels))
                transient.append(frames // rate * (taken * before + inside))
                taken = 4 * area
        return max(transient) + kept + area * 2 * width


class CoderStage(NamedTuple):
    """A part of the encoder that runs by itself: what it does, and how far back in time it reads."""

    run: Callable[[Tensor], Tensor]
    convolutions: int
    halves_time: bool

    def constant_after(self, frame: int) -> int:
        """From which frame on its output is constant, if its input is so from `frame` on.

        Each causal convolution reads two frames back; the halving one reads 2j-2 to 2j for its frame j.
        """
        frame += 2 * self.convolutions
        return (frame + 3) // 2 if self.halves_time else frame


def reuse_constant_tail(run: Callable[[Tensor], Tensor], chunks: Iterable[Tensor], constant: int) -> Iterator[Tensor]:
    """Run each chunk, but once an output begins at frame `constant` or later hand it out again for all to come."""
    out, start, settled = torch.empty(0), 0, False
    for chunk in chunks:
        if not settled:
            out = run(chunk)
            settled = start >= constant
            start += len(out)
        yield out


def register(levels: Iterable[Level], name: str, nested: bool) -> nn.ModuleList:
    """The levels' layers under the checkpoint's names: `name.N`, or nested `name.LEVEL.name.N`."""
    if nested:
        return nn.ModuleList(nn.ModuleDict({name: nn.ModuleList(level.layers)}) for level in levels)
    return nn.ModuleList(layer for level in levels for layer in level.layers)


class Region(NamedTuple):
    """A rectangle of a grid: rows from `top` to before `bottom`, columns from `left` to before `right`."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def tiles(cls, height: int, width: int, rows: int, columns: int) -> list[Region]:
        """Divide a grid into rows x columns regions whose sides differ by one cell at most, row by row."""
        if not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(f"{rows} x {columns} tiles do not fit a grid of {height} x {width} cells")
        ys = pairwise(height * i // rows for i in range(rows + 1))
        xs = list(pairwise(width * i // columns for i in range(columns + 1)))
        return [cls(*y, *x) for y, x in product(ys, xs)]

    def divided(self, rows: int, columns: int) -> list[Region]:
        """The region in rows x columns, as `tiles`."""
        top, left = self.top, self.left
        parts = Region.tiles(self.bottom - top, self.right - left, rows, columns)
        return [Region(top + a, top + b, left + c, left + d) for a, b, c, d in parts]

    @property
    def sides(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def area(self) -> int:
        return self.sides[0] * self.sides[1]

    def scaled(self, factor: int) -> Region:
        return Region(*(factor * edge for edge in self))

    def grown(self, before: int, after: int, frame: Region) -> Region:
        """Wider by `before` cells to the top and left and `after` to the bottom and right, within the frame."""
        near = max(self.top - before, frame.top), max(self.left - before, frame.left)
        far = min(self.bottom + after, frame.bottom), min(self.right + after, frame.right)
        return Region(near[0], far[0], near[1], far[1])

    def cut(self, x: Tensor, window: Region) -> Tensor:
        """This region of [T, H, W, C], of which `window` says where in the frame it lies."""
        rows = slice(self.top - window.top, self.bottom - window.top)
        columns = slice(self.left - window.left, self.right - window.left)
        return x[:, rows, columns]
