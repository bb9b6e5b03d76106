"""The layers that both video autoencoders are made of, run over a clip chunk by chunk.

Shapes: T frames, H rows, W columns, C channels, O output channels. A chunk is [T, H, W, C]: channels last in memory,
so that the norm reads contiguous rows and convolutions get their fastest layout. One clip at a time, no batch axis.
For inference: layers write in place and run under `torch.no_grad()`.

Every layer that looks back in time finds the frames it needs in a `ClipState`, so any division of a clip into chunks
gives the numbers of the whole clip. Causal means zeros before frame 0. The resamplers treat frame 0 by a rule of its
own: it is neither doubled nor halved in time, and the time convolution of `Upsample` never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

WIDTHS = (1, 2, 4, 4)  # of the encoder's levels, in multiples of the first; the decoder's in reverse
HALVES_TIME = (1, 2)  # encoder levels
DOUBLES_TIME = (0, 1)  # decoder levels
DECODER_RIM = (13, 12, 10, 7)  # cells of a level's own grid that influence a region from outside it
ENCODER_RIM = (8, 9)  # latent cells before and after; strided convolutions pad the far side only
NORM_EPSILON = 1e-24  # the square of the smallest length by which the original divides
# Bytes that a core's second cache, or a GPU's, holds beside what streams past (A100 40 MB, H100 50, RTX 4090 72).
STRIPS = {"cpu": 1 << 20, "cuda": 1 << 24}
WEIGHTS_PER_PIXEL = 5500  # of a convolution on a CPU: with more, a matrix product of patches is faster (measured)
LONG_SUM, FEW_PRODUCTS = 400, 400_000  # terms of a sum; a layer's weights times the cells of a latent frame


class ClipState:
    """State of one pass over one clip, by layer, kept between chunks. cells: of one frame of the whole latent."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.kept: dict[nn.Module, Tensor] = {}
        self._started: set[object] = set()

    def starts_clip(self, layer: object) -> bool:
        """Whether this is the layer's first chunk, the one that holds frame 0."""
        first = layer not in self._started
        self._started.add(layer)
        return first


def convolve(conv: nn.Module, x: Tensor, skipped: int = 0) -> Tensor:
    """Apply nn.Conv3d to [T, H, W, C], or nn.Conv2d frame by frame, without the first `skipped` frames of the kernel. A
    kernel of one pixel is a matrix product, as are patches of few pixels: oneDNN rearranges weights in each call."""
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    assert conv.bias is not None
    if math.prod(conv.kernel_size) == 1:
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    weight = conv.weight[:, :, skipped:] if skipped else conv.weight
    in_onednn = x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if in_onednn and weight.numel() > WEIGHTS_PER_PIXEL * x[..., 0].numel():
        rows, columns = map(int, conv.padding[-2:])
        x = F.pad(x, (0, 0, columns, columns, rows, rows))
        for axis, sizes in enumerate(zip(weight.shape[2:], conv.stride, strict=True), 5 - weight.ndim):
            x = x.unfold(axis, *sizes)
        return F.linear(x.movedim(3, -1).flatten(3), weight.movedim(1, -1).flatten(1), conv.bias)
    if isinstance(conv, nn.Conv2d):
        return rearrange(conv(rearrange(x, "t h w c -> t c h w")), "t c h w -> t h w c")
    # The batch axis comes before the permutation: only so do the strides of a batch of one count as channels last.
    x = x[None].permute(0, 4, 1, 2, 3)
    if in_onednn:  # which PyTorch itself calls for large C T H alone
        x = torch.ops.aten.mkldnn_convolution(x, weight, conv.bias, conv.padding, conv.stride, conv.dilation, 1)
    else:
        x = F.conv3d(x, weight.to(x.dtype), conv.bias.to(x.dtype), conv.stride, conv.padding)
    return rearrange(x[0], "c t h w -> t h w c")


def join_history(
    conv: nn.Conv3d, x: Tensor, state: ClipState, write: Callable[..., object] = lambda x, out: out.copy_(x)
) -> Tensor:
    """Input of a convolution: a chunk behind the frames before it that `conv` reads. `write(x, out)` puts the chunk
    straight behind the history, so that joining the two costs no pass of its own."""
    history = conv.kernel_size[0] - conv.stride[0]
    frames = x.new_empty(history + x.shape[0], *x.shape[1:])
    frames[:history] = state.kept.get(conv, 0)
    write(x, frames[history:])
    state.kept[conv] = frames[-history:].clone()  # a view would hold the whole chunk in memory
    return frames


def convolve_causally(conv: nn.Conv3d, frames: Tensor, state: ClipState) -> Tensor:
    """`conv` of what `join_history` gave. A CPU makes no products with the zeros before a clip, and adds long sums of
    few products in 64 bits, at next to no cost: norms can magnify an error. Whole pictures decide, so tiles agree."""
    long, few = conv.weight[0].numel() > LONG_SUM, state.cells * conv.weight.numel() < FEW_PRODUCTS
    x = frames.double() if frames.is_cpu and long and few else frames
    parts = [(x, 0)]
    if state.starts_clip(conv) and x.is_cpu:
        parts = [(x[2:3], 2), (x[2:4], 1), (x[2:], 0)][: len(x) - 2]
    made = [convolve(conv, part, skipped).to(frames.dtype) for part, skipped in parts]
    return torch.cat(made) if len(made) > 1 else made[0]


class RMSNorm(nn.Module):
    """Divide each pixel by the root mean square of its channels, then scale by gamma."""

    def __init__(self, channels: int, axes: int) -> None:
        """axes: how many axes of size 1 follow the channels in the checkpoint's gamma."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.flatten()
        return F.rms_norm(x, gamma.shape, gamma, NORM_EPSILON)

    def activate(self, x: Tensor, out: Tensor) -> None:
        """The norm of x [T, H, W, C] through SiLU, into `out`. In strips of rows: the norm's result is read back before
        it has left the device's cache."""
        rows = max(1, STRIPS.get(x.device.type, x[0].nbytes) // x[0, 0].nbytes)
        for frame, target in zip(x, out, strict=True):
            for strip, written in zip(frame.split(rows), target.split(rows), strict=True):
                torch.ops.aten.silu.out(self(strip), out=written)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal 3x3x3 convolution, plus the block's input."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels, out_channels
        norm1, norm2 = RMSNorm(channels, axes=3), RMSNorm(out_channels, axes=3)
        conv1 = nn.Conv3d(channels, out_channels, 3, padding=(0, 1, 1))
        conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=(0, 1, 1))
        # The numbers are the checkpoint's; those between had no parameters.
        self.residual = nn.ModuleDict({"0": norm1, "2": conv1, "3": norm2, "6": conv2})
        self.steps = (norm1, conv1), (norm2, conv2)
        self.shortcut = nn.Conv3d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        y = x
        for norm, conv in self.steps:  # a name is reused at each step, so that its last tensor is freed
            y = join_history(conv, y, state, norm.activate)
            y = convolve_causally(conv, y, state)
        return y.add_(x if self.shortcut is None else convolve(self.shortcut, x))


class FrameAttention(nn.Module):
    """One head as wide as the channels, over the pixels of each frame by itself, plus the block's input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = convolve(self.to_qkv, self.norm(x))
        q, k, v = rearrange(qkv, "t h w (three c) -> three t 1 (h w) c", three=3)
        seen = F.scaled_dot_product_attention(q, k, v)
        return convolve(self.proj, rearrange(seen, "t 1 (h w) c -> t h w c", h=x.shape[1])).add_(x)


class Downsample(nn.Module):
    """Halve H and W and, with `in_time`, then T: [T, H, W, C] -> [T or T/2, H/2, W/2, C]."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2, padding=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        # The windows start at pixel 0 and only the far border is padded. Padding by a whole stride and dropping the
        # first row and column gives the same numbers without a padded copy of the input.
        x = convolve(self.resample["1"], x)[:, 1:, 1:]
        if self.time_conv is None:
            return x
        frames = join_history(self.time_conv, x, state)
        if not state.starts_clip(self):
            return convolve(self.time_conv, frames)
        return torch.cat([x[:1], convolve(self.time_conv, frames[1:])]) if len(x) > 1 else x


class Upsample(nn.Module):
    """With `in_time` double T, then double H and W: [T, H, W, C] -> [T or 2T, 2H, 2W, O]; 2T - 1 at a clip's start."""

    def __init__(self, channels: int, out_channels: int, in_time: bool) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, out_channels, 3, padding=1)})
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        """The time convolution's two halves of channels are the earlier and the later frame: they are interleaved while
        the frames are small."""
        if self.time_conv:
            alone = 1 if state.starts_clip(self) else 0
            frames = x.new_empty(2 * len(x) - alone, *x.shape[1:])
            frames[:alone] = x[:alone]
            if len(x) > alone:
                pairs = convolve(self.time_conv, join_history(self.time_conv, x[alone:], state))
                frames[alone:].unflatten(0, (-1, 2)).copy_(rearrange(pairs, "t h w (f c) -> t f h w c", f=2))
                del pairs
            x = frames
        conv = self.resample["1"]
        assert isinstance(conv, nn.Conv2d)
        if conv not in state.kept:
            state.kept[conv] = doubling(conv.weight)
        x = rearrange(x, "t h w c -> t c h w")
        fine = F.conv_transpose2d(x, state.kept[conv], conv.bias, stride=2, padding=1)
        return rearrange(fine, "t c h w -> t h w c")


def doubling(weight: Tensor) -> Tensor:
    """The transposed convolution [C, O, 4, 4] of stride 2 that is nearest doubling and then `weight` [O, C, 3, 3].

    Row 2i of the result sees rows i-1, i, i of the small one, row 2i+1 sees i, i, i+1; columns alike. Adding the
    weights that meet the same pixel leaves four convolutions of 2 x 2, one for each parity: 4/9 of the products, equal
    to rounding.
    """
    weight = weight.permute(1, 2, 3, 0).contiguous()  # sums of rows of O numbers, already in the result's layout
    for axis in (1, 2):
        first, middle, last = weight.unbind(axis)  # row k of the transposed kernel leads from pixel i to 2i - 1 + k
        weight = torch.stack([last, middle + last, first + middle, first], axis)
    return weight.permute(0, 3, 1, 2)


def add_average(y: Tensor, x: Tensor, starts: bool, *, frames: int, space: int) -> Tensor:
    """Add a level's input x, averaged over `space` x `space` pixels, to its output y. With frames=2 each channel c
    becomes 2c (earlier frame) and 2c+1 (later frame), and a frame of zeros precedes the clip. starts: x begins the
    clip."""
    if starts and frames == 2:
        x = F.pad(x, (0, 0) * 3 + (1, 0))
    return y.add_(reduce(x, "(t f) (h p) (w q) c -> t h w (c f)", "mean", f=frames, p=space, q=space))


def add_repeated(y: Tensor, x: Tensor, starts: bool, *, frames: int) -> Tensor:
    """Add a level's input x, each pixel repeated over the output pixels it covers, to that output y. Where the level
    halves the channels, channels 2o and 2o+1 go to the even and the odd rows of output channel o."""
    coarse = rearrange(x, "t h w (o p) -> t 1 h p w 1 o", p=x.shape[-1] // y.shape[-1])
    alone = 1 if starts and frames == 2 else 0
    for fine, part, f in ((y[:alone], coarse[:alone], 1), (y[alone:], coarse[alone:], frames)):
        rearrange(fine, "(t f) (h p) (w q) c -> t f h p w q c", f=f, p=2, q=2).add_(part)
    return y


class Level:
    """The layers that work at one resolution, inside a parameter-free shortcut if there is one. Not a module:
    checkpoints name the same layers in two ways, and the owner registers them."""

    def __init__(self, layers: list[nn.Module], shortcut: Callable[[Tensor, Tensor, bool], Tensor] | None) -> None:
        self.layers, self.shortcut = layers, shortcut

    def __call__(self, x: Tensor, state: ClipState) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y, state)
        return y if self.shortcut is None else self.shortcut(y, x, state.starts_clip(self))


class Coder(nn.Module):
    """Layers that encoder and decoder share: the first convolution, the middle, the head. All levels but the last
    halve or double H and W; two also change the frame rate."""

    def __init__(self, channels: int, first: int, inner: int, last: int, out_channels: int) -> None:
        super().__init__()
        self.levels: list[Level] = []
        self.conv1 = nn.Conv3d(channels, first, 3, padding=(0, 1, 1))
        self.middle = nn.ModuleList([ResidualBlock(inner, inner), FrameAttention(inner), ResidualBlock(inner, inner)])
        self.last = RMSNorm(last, axes=3), nn.Conv3d(last, out_channels, 3, padding=(0, 1, 1))
        self.head = nn.ModuleDict({"0": self.last[0], "2": self.last[1]})

    def register(self, name: str, nested: bool) -> nn.ModuleList:
        """The levels' layers under the checkpoint's names: `name.N`, or nested `name.LEVEL.name.N`."""
        if nested:
            return nn.ModuleList(nn.ModuleDict({name: nn.ModuleList(level.layers)}) for level in self.levels)
        return nn.ModuleList(layer for level in self.levels for layer in level.layers)

    def run_first(self, x: Tensor, state: ClipState) -> Tensor:
        return convolve_causally(self.conv1, join_history(self.conv1, x, state), state)

    def run_middle(self, x: Tensor, state: ClipState) -> Tensor:
        before, attention, after = self.middle
        return after(attention(before(x, state)), state)

    def run_head(self, x: Tensor, state: ClipState) -> Tensor:
        norm, conv = self.last
        return convolve_causally(conv, join_history(conv, x, state, norm.activate), state)


class Encoder(Coder):
    """[T, H, W, C] pixels -> [L, H/8, W/8, out_channels]: mean and log-variance of the latent."""

    def __init__(self, channels: int, width: int, out_channels: int, nested: bool) -> None:
        widths = [width * multiple for multiple in (1, *WIDTHS)]
        super().__init__(channels, widths[0], widths[-1], widths[-1], out_channels)
        for index, (before, after) in enumerate(pairwise(widths)):
            layers: list[nn.Module] = [ResidualBlock(before, after), ResidualBlock(after, after)]
            in_time, last = index in HALVES_TIME, index == 3
            if not last:
                layers.append(Downsample(after, in_time))
            shortcut = partial(add_average, frames=2 if in_time else 1, space=1 if last else 2) if nested else None
            self.levels.append(Level(layers, shortcut))
        self.downsamples = self.register("downsamples", nested)

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
        before = widths[0]
        for index, after in enumerate(widths):
            layers: list[nn.Module] = [ResidualBlock(each, after) for each in (before, after, after)]
            in_time, last = index in DOUBLES_TIME, index == 3
            before = after if nested else after // 2  # Wan2.1's upsampling halves the channels
            if not last:
                layers.append(Upsample(after, before, in_time))
            shortcut = partial(add_repeated, frames=2 if in_time else 1) if nested and not last else None
            self.levels.append(Level(layers, shortcut))
        self.upsamples = self.register("upsamples", nested)

    def start(self, x: Tensor, state: ClipState) -> Tensor:
        """All that needs whole frames."""
        return self.run_middle(self.run_first(x, state), state)

    def finish(self, x: Tensor, region: Region, state: ClipState) -> Tensor:
        """From whole frames of the latent grid to the region's pixels. Each level takes in the region and its rim:
        errors beyond an inner edge are cut off before they can reach the region."""
        frame = window = Region(0, x.shape[1], 0, x.shape[2])
        for level, rim in zip(self.levels, DECODER_RIM, strict=True):
            wanted = region.grown(rim, rim, frame)
            x = level(wanted.cut(x, window), state)
            scale = x.shape[1] // wanted.sides[0]
            region, frame, window = region.scaled(scale), frame.scaled(scale), wanted.scaled(scale)
        return region.cut(self.run_head(x, state), window)

    def peak(self, grid: tuple[int, int], regions: Sequence[Region], chunk: int) -> int:
        """Numbers alive at once, at most, while `finish` runs for the largest region of a latent grid, chunk by chunk.

        A level holds its input, a residual block's input, the result of its first convolution, the second's buffer with
        two frames of history, and the two kept for the next chunk; every convolution of every level keeps two frames.
        """
        # taken: cells of a level's input, with the rim of the level before
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
        """From which frame on its output is constant, if its input is so from `frame` on: each causal convolution reads
        two frames back; the halving one reads 2j-2 to 2j for its frame j."""
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


Tiles = tuple[int, int]  # rows and columns


class Region(NamedTuple):
    """A rectangle of a grid: rows from `top` to before `bottom`, columns from `left` to before `right`."""

    top: int
    bottom: int
    left: int
    right: int

    def divided(self, rows: int, columns: int) -> list[Region]:
        """The region in rows x columns parts whose sides differ by one cell at most, row by row."""
        height, width = self.sides
        if not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(f"{rows} x {columns} tiles do not fit a grid of {height} x {width} cells")
        ys = pairwise(self.top + height * i // rows for i in range(rows + 1))
        xs = list(pairwise(self.left + width * i // columns for i in range(columns + 1)))
        return [Region(*y, *x) for y, x in product(ys, xs)]

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
        top, bottom = max(self.top - before, frame.top), min(self.bottom + after, frame.bottom)
        return Region(top, bottom, max(self.left - before, frame.left), min(self.right + after, frame.right))

    def cut(self, x: Tensor, window: Region) -> Tensor:
        """This region of [T, H, W, C], of which `window` says where in the frame it lies."""
        rows = slice(self.top - window.top, self.bottom - window.top)
        columns = slice(self.left - window.left, self.right - window.left)
        return x[:, rows, columns]
