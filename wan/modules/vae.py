"""The two causal video autoencoders, Wan2.1's (A14B models) and Wan2.2's (TI2V-5B), from the same layers.

Shapes: T frames, L latent frames (T = 4L - 3), H, W a frame's rows and columns, h, w the latent grid's, C channels,
z latent channels. Clips are [3, T, H, W] in [-1, 1], latents [z, L, h, w]; inside, chunks are [T, H, W, C].

Both ways a clip passes three stages: a part that looks at neighbouring pixels only, `middle` with its attention over
whole frames, and the latent. The first may be run for any `Region` of the frame by itself (tiles on one device, or one
region on each of several): it then takes in a rim as wide as its convolutions reach and crops it, so results are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.configs import TASKS
from wan.configs.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.modules.vae_layers import (
    ClipState,
    Downsample,
    FrameAttention,
    Level,
    Region,
    ResidualBlock,
    RMSNorm,
    Upsample,
    add_average,
    add_repeated,
    convolve,
    join_history,
)

VAES = {16: (16, 96, 96, False), 48: (48, 160, 256, True)}  # latent channels -> the arguments of WanVAE
WIDTHS = (1, 2, 4, 4)  # of the encoder's levels, in multiples of the first; the decoder's in reverse
HALVES_TIME = (1, 2)  # encoder levels
DOUBLES_TIME = (0, 1)  # decoder levels
DECODER_RIM = (13, 12, 10, 7)  # cells of a level's own grid that influence a region from outside it
ENCODER_RIM = (8, 9)  # latent cells before and after; strided convolutions pad the far side only
ENCODING = 36  # frames of the encoder's first width that are alive at its peak: four frames at work, and histories
STARTING = 5  # the same of the decoder's middle, beside what it has made: in chunks of its features
NESTED_NAME = "decoder.upsamples.0.upsamples.0.residual.0.gamma"  # only in Wan2.2's checkpoint


class WanVAE(nn.Module):
    """One of the two autoencoders; parameter names are the checkpoint's."""

    def __init__(self, z_dim: int, encoder_width: int, decoder_width: int, nested: bool) -> None:
        """nested: Wan2.2's form, with 2x2 pixels folded into channels and a shortcut around each level."""
        super().__init__()
        self.z_dim = z_dim
        self.patch = 2 if nested else 1
        self.stride = (4, 8 * self.patch, 8 * self.patch)
        self.encoder = Encoder(3 * self.patch**2, encoder_width, 2 * z_dim, nested)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(z_dim, decoder_width, 3 * self.patch**2, nested)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> WanVAE:
        """Build the autoencoder that a checkpoint's tensor shapes describe, on torch's default device.

        Raises ValueError with the names that do not fit if it is neither of the two.
        """
        try:
            z_dim, encoder_width = shapes["conv2.weight"][0], shapes["encoder.conv1.weight"][0]
            decoder_width = shapes["decoder.head.0.gamma"][0]
        except (KeyError, IndexError) as e:
            raise ValueError(f"not a Wan video autoencoder: tensor {e} is missing or has no axes") from e
        if z_dim not in LATENT_MEAN:
            raise ValueError(f"not a Wan video autoencoder: conv2.weight has {z_dim} latent channels, not 16 or 48")
        vae = cls(z_dim, encoder_width, decoder_width, nested=NESTED_NAME in shapes)
        own = {name: tuple(parameter.shape) for name, parameter in vae.named_parameters()}
        wrong = [f"{name} is missing" for name in own if name not in shapes]
        wrong += [f"{name} is not part of it" for name in shapes if name not in own]
        wrong += [
            f"{name} is {tuple(shapes[name])}, not {shape}"
            for name, shape in own.items()
            if name in shapes and tuple(shapes[name]) != shape
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"not a Wan video autoencoder: {', '.join(wrong[:4])}{more}")
        return vae

    def use_channels_last(self) -> None:
        """Store convolution weights in the layout of the activations. Call once loaded: without it the numbers are the
        same, but on a GPU each call rearranges its weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
            elif isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)

    def decode_in(self, dtype: torch.dtype) -> None:
        """Cast what decodes. The encoder stays as it is: what it gets wrong every step would start from."""
        for module in (self.conv2, self.decoder):
            module.to(dtype)

    # Pixels to latents

    def encode(
        self, video: Tensor, chunk: int = 1, tiles: tuple[int, int] = (1, 1), frames: int | None = None
    ) -> Tensor:
        """[3, T, H, W] -> [z, (T-1)//4 + 1, h, w] float32, normalised; up to 3 frames beyond 4k+1 are left out.

        The latent is the mean; nothing is drawn. Other arguments: see `encode_region`.
        """
        return self.encode_features(self.encode_region(video, None, frames, chunk, tiles), chunk)

    @torch.no_grad()
    def encode_region(
        self,
        video: Tensor,
        region: Region | None = None,
        frames: int | None = None,
        chunk: int = 1,
        tiles: tuple[int, int] = (1, 1),
    ) -> Tensor:
        """What `encode_features` wants, [L, rows, columns, C], for one region of the latent grid or all of it.

        video: the whole frames, [3, T, H, W]; followed by mid-grey ones (0) if `frames` says that the clip is longer,
        at less than half the work (see `reuse_constant_tail`). chunk: latent frames per call of the network.
        tiles: rows and columns into which the region is divided, with less memory and the same numbers.
        Raises ValueError for sizes that are not multiples of the stride.
        """
        (_, rows, columns), frames = self.stride, video.shape[1] if frames is None else frames
        if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
            raise ValueError(f"a clip must be [3, frames, height, width], not {list(video.shape)}")
        if video.shape[2] % rows or video.shape[3] % columns:
            size = f"{video.shape[3]} x {video.shape[2]}"
            raise ValueError(f"width and height must be multiples of {rows}, not {size}")
        if frames < video.shape[1] or chunk < 1:
            raise ValueError(f"frames must be {video.shape[1]} or more and chunk 1 or more, not {frames} and {chunk}")
        frame = Region(0, video.shape[2] // rows, 0, video.shape[3] // columns)
        region = region or frame
        if tiles != (1, 1):
            # clones: a view would keep its rim alive until the last tile is done
            parts = [self.encode_region(video, part, frames, chunk).clone() for part in region.divided(*tiles)]
            features = parts[0].new_empty(len(parts[0]), *region.sides, parts[0].shape[-1])
            for part, made in zip(region.divided(*tiles), parts, strict=True):
                part.cut(features, region).copy_(made)
            return features
        window = region.grown(*ENCODER_RIM, frame)
        state, constant = ClipState(), video.shape[1]
        stream = self._pixel_chunks(video, window.scaled(rows), frames, chunk)
        for stage in self.encoder.stages(state):
            constant = stage.constant_after(constant)
            stream = reuse_constant_tail(stage.run, stream, constant)
        return region.cut(torch.cat(list(stream)), window)

    @torch.no_grad()
    def encode_features(self, features: Tensor, chunk: int = 1) -> Tensor:
        """Finish the encoding of whole frames: [L, h, w, C] -> [z, L, h, w]."""
        state = ClipState()
        code = torch.cat([self.encoder.finish(part, state) for part in features.split(chunk)])
        mean, inverse_std = self._statistics(code.device)
        latent = (convolve(self.conv1, code)[..., : self.z_dim].float() - mean) * inverse_std
        return rearrange(latent, "l h w z -> z l h w").contiguous()

    def _pixel_chunks(self, video: Tensor, window: Region, frames: int, chunk: int) -> Iterator[Tensor]:
        """The clip as the encoder reads it, [T, H, W, 3 x patch area]. What does not divide goes into the first chunk,
        so that all others are alike."""
        latents = (frames - 1) // 4
        edges = [0, *range(1 + 4 * (latents % chunk), 2 + 4 * latents, 4 * chunk)]
        for start, end in pairwise(edges):
            part = video[:, start:end, window.top : window.bottom, window.left : window.right].to(self.conv1.weight)
            part = F.pad(part, (0, 0, 0, 0, 0, end - start - part.shape[1]))
            yield rearrange(part, "c t (h p) (w q) -> t h w (c q p)", p=self.patch, q=self.patch)

    def encode_peak(
        self, shape: tuple[int, int, int], tiles: tuple[int, int] = (1, 1), region: Region | None = None
    ) -> int:
        """Bytes alive at once, at most, in `encode_region`, weights and the clip itself aside: about.

        shape: L, h, w. What comes out of a tile, with its rim, and of the tiles before it counts, too; when they are
        put together all is there twice.
        """
        length, *grid = shape
        frame = Region(0, grid[0], 0, grid[1])
        region = region or frame
        pixels = ENCODING * self.stride[1] * self.stride[2] // self.patch**2
        inside = pixels * self.encoder.conv1.out_channels * self.conv1.weight.element_size()
        most, waiting = self.encoded_bytes(2 * length * region.area), 0
        for part in region.divided(*tiles):
            window = part.grown(*ENCODER_RIM, frame).area
            most = max(most, inside * window + self.encoded_bytes(length * (window + waiting)))
            waiting += part.area
        return most

    def encoded_bytes(self, cells: int) -> int:
        """Of what `encode_region` gives for so many cells, frames x rows x columns."""
        return cells * self.encoder.last[1].in_channels * self.conv1.weight.element_size()

    # Latents to pixels

    @torch.no_grad()
    def decode(
        self, latent: Tensor, chunk: int = 2, tiles: tuple[int, int] = (1, 1), region: Region | None = None
    ) -> Iterator[Tensor]:
        """[z, L, h, w] -> chunks [3, t, H, W] float32 in [-1, 1], in order of time, 4L - 3 frames in all.

        chunk: latent frames per call of the network: more is faster and takes more memory. region: of the latent grid.
        tiles: rows and columns into which it is divided. Each is decoded for the whole clip before the next, with far
        less memory and the same numbers. A GPU's pixels wait in host memory: its own is for work.
        """
        region = region or Region(0, latent.shape[-2], 0, latent.shape[-1])
        divided = region.divided(*tiles)  # ValueError for tiles that do not fit, before any work
        features = self.decode_features(latent, chunk)
        if tiles == (1, 1):
            yield from self.decode_region(features, region, chunk)
            return
        frame = region.scaled(self.stride[1])
        device = torch.device("cpu") if features.device.type == "cuda" else features.device
        video = torch.empty(3, 4 * len(features) - 3, *frame.sides, device=device)
        for tile in divided:
            target, start = tile.scaled(self.stride[1]).cut(video.movedim(0, -1), frame), 0
            for part in self.decode_region(features, tile, chunk):
                target[start : start + part.shape[1]] = part.movedim(0, -1)
                start += part.shape[1]
        counts = [4 * len(part) for part in features.split(chunk)]
        counts[0] -= 3  # the first frame stands alone
        for part in video.split(counts, dim=1):
            yield part.to(features.device)

    @torch.no_grad()
    def decode_features(self, latent: Tensor, chunk: int = 2) -> Tensor:
        """What `decode_region` wants, for whole frames: [z, L, h, w] -> [L, h, w, C]."""
        if latent.ndim != 4 or latent.shape[0] != self.z_dim or 0 in latent.shape:
            raise ValueError(f"a latent must be [{self.z_dim}, frames, rows, columns], not {list(latent.shape)}")
        if chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {chunk}")
        mean, inverse_std = self._statistics(self.conv2.weight.device)
        state = ClipState()
        code = rearrange(latent, "z l h w -> l h w z").to(mean) / inverse_std + mean
        code = convolve(self.conv2, code.to(self.conv2.weight.dtype))
        return torch.cat([self.decoder.start(part, state) for part in code.split(chunk)])

    @torch.no_grad()
    def decode_region(self, features: Tensor, region: Region, chunk: int = 2) -> Iterator[Tensor]:
        """The region's pixels of each chunk in turn, [3, t, rows, columns] float32 in [-1, 1]."""
        state = ClipState()
        for part in features.split(chunk):
            pixels = self.decoder.finish(part, region, state)
            pixels = rearrange(pixels, "t h w (c q p) -> c t (h p) (w q)", p=self.patch, q=self.patch)
            yield pixels.float().clamp_(-1, 1)

    def decode_peak(
        self,
        shape: tuple[int, int, int, int],
        chunk: int = 2,
        tiles: tuple[int, int] = (1, 1),
        region: Region | None = None,
    ) -> int:
        """Bytes of the device alive at once, at most, in a `decode` of a latent of this shape, weights aside; within
        10 %. Of tiles what waits is not counted: a GPU's is in host memory. region: what is decoded of the frame."""
        _, length, height, width = shape
        regions = (region or Region(0, height, 0, width)).divided(*tiles)
        pixels = 3 * max(part.area for part in regions) * self.stride[1] * self.stride[2]
        features = length * height * width * self.decoder.conv1.out_channels
        inside = self.decoder.peak((height, width), regions, min(chunk, length))
        before = features + STARTING * min(chunk, length) * features // length  # its parts are put together at the end
        video = 8 * pixels * chunk
        itemsize = self.conv2.weight.element_size()
        return max(itemsize * (inside + features) + 4 * video, itemsize * (before + features))

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The latents' mean and reciprocal deviation in float32. Both directions use the reciprocal, as the original
        does, which differs from the deviation in the last bit."""
        mean = torch.tensor(LATENT_MEAN[self.z_dim], device=device)
        return mean, 1.0 / torch.tensor(LATENT_STD[self.z_dim], device=device)


def released_vae(task: str) -> WanVAE:
    """The autoencoder of `task` on the meta device."""
    with torch.device("meta"):
        return WanVAE(*VAES[TASKS[task].out_dim])


class Coder(nn.Module):
    """What encoder and decoder have in common: the first convolution, the middle, the head.

    Encoder levels halve H and W (all but the last), decoder levels double them; two of each also change the frame rate.
    """

    def __init__(self, channels: int, first: int, middle: int, last: int, out_channels: int) -> None:
        super().__init__()
        self.levels: list[Level] = []
        self.conv1 = nn.Conv3d(channels, first, 3, padding=(0, 1, 1))
        self.middle = nn.ModuleList(
            [ResidualBlock(middle, middle), FrameAttention(middle), ResidualBlock(middle, middle)]
        )
        self.last = RMSNorm(last, axes=3), nn.Conv3d(last, out_channels, 3, padding=(0, 1, 1))
        self.head = nn.ModuleDict({"0": self.last[0], "2": self.last[1]})

    def register(self, name: str, nested: bool) -> nn.ModuleList:
        """The levels' layers under the checkpoint's names: `name.N`, or nested `name.LEVEL.name.N`."""
        if nested:
            return nn.ModuleList(nn.ModuleDict({name: nn.ModuleList(level.layers)}) for level in self.levels)
        return nn.ModuleList(layer for level in self.levels for layer in level.layers)

    def run_first(self, x: Tensor, state: ClipState) -> Tensor:
        return convolve(self.conv1, join_history(self.conv1, x, state))

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
            layers: list[nn.Module] = [ResidualBlock(before, after)]
            layers += [ResidualBlock(after, after), ResidualBlock(after, after)]
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
        """From whole frames of the latent grid to the region's pixels. Each level takes in the region and its rim; what
        its convolutions get wrong beyond an inner edge is cut off before it can reach the region."""
        frame = window = Region(0, x.shape[1], 0, x.shape[2])
        for level, rim in zip(self.levels, DECODER_RIM, strict=True):
            wanted = region.grown(rim, rim, frame)
            x = level(wanted.cut(x, window), state)
            scale = x.shape[1] // wanted.sides[0]
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
