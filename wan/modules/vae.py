"""The two causal video autoencoders, Wan2.1's (A14B models) and Wan2.2's (TI2V-5B), from the same layers.

Shapes: T frames, L latent frames (T = 4L - 3), H, W a frame's rows and columns, h, w the latent grid's, C channels,
z latent channels. Clips are [3, T, H, W] in [-1, 1], latents [z, L, h, w]; inside, chunks are [T, H, W, C].

Both ways a clip passes three stages: a part that looks at neighbouring pixels only, `middle` with its attention over
whole frames, and the latent. The first may be run for any `Region` of the frame by itself (tiles on one device, or one
region on each of several): it then takes in a rim as wide as its convolutions reach and crops it, so results are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.configs import TASKS
from wan.configs.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.modules.vae_layers import (
    ENCODER_RIM,
    ClipState,
    Decoder,
    Encoder,
    Region,
    Tiles,
    convolve,
    reuse_constant_tail,
)

VAES = {16: (16, 96, 96, False), 48: (48, 160, 256, True)}  # latent channels -> the arguments of WanVAE
ENCODING = 36  # frames of the encoder's first width that are alive at its peak: four frames at work, and histories
STARTING = 5  # the same of the decoder's middle, beside what it has made: in chunks of its features
NESTED_NAME = "decoder.upsamples.0.upsamples.0.residual.0.gamma"  # only in Wan2.2's checkpoint
Convert = Callable[[Tensor], Tensor]  # of pixels, chunk by chunk
AS_IS: Convert = nn.Identity()


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
        """Build the autoencoder that a checkpoint's tensor shapes describe, on torch's default device. ValueError with
        the names that do not fit if it is neither of the two."""
        try:
            z_dim, encoder_width = shapes["conv2.weight"][0], shapes["encoder.conv1.weight"][0]
            decoder_width = shapes["decoder.head.0.gamma"][0]
        except (KeyError, IndexError) as e:
            raise ValueError(f"not a Wan video autoencoder: tensor {e} is missing or has no axes") from e
        if z_dim not in LATENT_MEAN:
            raise ValueError(f"not a Wan video autoencoder: conv2.weight has {z_dim} latent channels, not 16 or 48")
        vae = cls(z_dim, encoder_width, decoder_width, nested=NESTED_NAME in shapes)
        own = {name: tuple(parameter.shape) for name, parameter in vae.named_parameters()}
        found = {name: tuple(shape) for name, shape in shapes.items()}
        wrong = [f"{name} is missing" for name in own if name not in found]
        wrong += [f"{name} is not part of it" for name in found if name not in own]
        wrong += [f"{n} is {found[n]}, not {shape}" for n, shape in own.items() if found.get(n, shape) != shape]
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

    def encode(self, video: Tensor, chunk: int = 1, tiles: Tiles = (1, 1), frames: int | None = None) -> Tensor:
        """[3, T, H, W] -> [z, (T-1)//4 + 1, h, w] float32, normalised: the mean, nothing is drawn. Up to 3 frames
        beyond 4k+1 are left out. Other arguments: see `encode_region`."""
        return self.encode_features(self.encode_region(video, None, frames, chunk, tiles), chunk)

    @torch.no_grad()
    def encode_region(
        self,
        video: Tensor,
        region: Region | None = None,
        frames: int | None = None,
        chunk: int = 1,
        tiles: Tiles = (1, 1),
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
        state, constant = ClipState(frame.area), video.shape[1]
        stream = self._pixel_chunks(video, window.scaled(rows), frames, chunk)
        for stage in self.encoder.stages(state):
            constant = stage.constant_after(constant)
            stream = reuse_constant_tail(stage.run, stream, constant)
        return region.cut(torch.cat(list(stream)), window)

    @torch.no_grad()
    def encode_features(self, features: Tensor, chunk: int = 1) -> Tensor:
        """Finish the encoding of whole frames: [L, h, w, C] -> [z, L, h, w]."""
        state = ClipState(features[0, ..., 0].numel())
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

    def encode_peak(self, shape: tuple[int, int, int], tiles: Tiles = (1, 1), region: Region | None = None) -> int:
        """Bytes alive at once, at most, in `encode_region`, weights and the clip itself aside: about. shape: L, h, w.
        The features of this tile, with its rim, and of those before it count, too; put together all are there twice."""
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
        """Bytes of the result of `encode_region` for this number of cells, frames x rows x columns."""
        return cells * self.encoder.last[1].in_channels * self.conv1.weight.element_size()

    # Latents to pixels

    @torch.no_grad()
    def decode(
        self, latent: Tensor, chunk: int = 2, tiles: Tiles = (1, 1), region: Region | None = None,
        convert: Convert = AS_IS,
    ) -> Iterator[Tensor]:  # fmt: skip
        """[z, L, h, w] -> chunks [3, t, H, W] of `convert`ed float32 in [-1, 1], in order of time, 4L - 3 frames.

        chunk: latent frames per call of the network: more is faster and takes more memory. region: of the latent grid.
        tiles: rows and columns into which it is divided. Each is decoded for the whole clip before the next, with far
        less memory and the same numbers. A GPU's pixels then wait, and come, in host memory: its own is for work.
        """
        region = region or Region(0, latent.shape[-2], 0, latent.shape[-1])
        divided = region.divided(*tiles)  # ValueError for tiles that do not fit, before any work
        features = self.decode_features(latent, chunk)
        if tiles == (1, 1):
            yield from map(convert, self.decode_region(features, region, chunk))
            return
        frame = region.scaled(self.stride[1])
        device = torch.device("cpu") if features.device.type == "cuda" else features.device
        video = torch.empty(3, 4 * len(features) - 3, *frame.sides, dtype=convert(torch.zeros(1)).dtype, device=device)
        for tile in divided:
            target, start = tile.scaled(self.stride[1]).cut(video.movedim(0, -1), frame), 0
            for part in map(convert, self.decode_region(features, tile, chunk)):
                target[start : start + part.shape[1]] = part.movedim(0, -1)
                start += part.shape[1]
        counts = [4 * len(part) for part in features.split(chunk)]
        counts[0] -= 3  # the first frame is a part by itself
        yield from video.split(counts, dim=1)

    @torch.no_grad()
    def decode_features(self, latent: Tensor, chunk: int = 2) -> Tensor:
        """What `decode_region` wants, for whole frames: [z, L, h, w] -> [L, h, w, C]."""
        if latent.ndim != 4 or latent.shape[0] != self.z_dim or 0 in latent.shape:
            raise ValueError(f"a latent must be [{self.z_dim}, frames, rows, columns], not {list(latent.shape)}")
        if chunk < 1:
            raise ValueError(f"chunk must be 1 or more, not {chunk}")
        mean, inverse_std = self._statistics(self.conv2.weight.device)
        state = ClipState(latent[0, 0].numel())
        code = rearrange(latent, "z l h w -> l h w z").to(mean) / inverse_std + mean
        code = convolve(self.conv2, code.to(self.conv2.weight.dtype))
        return torch.cat([self.decoder.start(part, state) for part in code.split(chunk)])

    @torch.no_grad()
    def decode_region(self, features: Tensor, region: Region, chunk: int = 2) -> Iterator[Tensor]:
        """The region's pixels of each chunk in turn, [3, t, rows, columns] float32 in [-1, 1]."""
        state = ClipState(features[0, ..., 0].numel())
        for part in features.split(chunk):
            pixels = self.decoder.finish(part, region, state)
            pixels = rearrange(pixels, "t h w (c q p) -> c t (h p) (w q)", p=self.patch, q=self.patch)
            yield pixels.float().clamp_(-1, 1)

    def decode_peak(
        self, shape: tuple[int, int, int, int], chunk: int = 2, tiles: Tiles = (1, 1), region: Region | None = None
    ) -> int:
        """Bytes of the device alive at once, at most, in a `decode` of a latent of this shape, weights and the pixels
        of finished tiles aside; within 10 %. region: the part of the frame that is decoded."""
        _, length, height, width = shape
        regions = (region or Region(0, height, 0, width)).divided(*tiles)
        video = 8 * chunk * 3 * max(part.area for part in regions) * self.stride[1] * self.stride[2]
        features = length * height * width * self.decoder.conv1.out_channels
        inside = self.decoder.peak((height, width), regions, min(chunk, length))
        before = features + STARTING * min(chunk, length) * features // length  # its parts are put together at the end
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
