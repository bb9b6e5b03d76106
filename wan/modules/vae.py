"""The two causal video autoencoders, Wan2.1's (A14B models) and Wan2.2's (TI2V-5B), from the same layers.

Shapes: T frames, L latent frames (T = 4L - 3), H, W a frame's rows and columns, h, w the latent grid's, C channels,
z latent channels. Clips are [3, T, H, W] in [-1, 1], latents [z, L, h, w]; inside, chunks are [T, H, W, C].

Both ways a clip passes three stages: a part that looks at neighbouring pixels only, `middle` with its attention over
whole frames, and the latent. The first may be run for any `Region` of the frame by itself (tiles on one device, or one
region on each of several): it then takes in a rim as wide as its convolutions reach and crops it, so results are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.configs.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.modules.causal_conv import ClipState, convolve
from wan.modules.vae_coders import ENCODER_RIM, Decoder, Encoder, Region, reuse_constant_tail

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

    def encode(self, video: Tensor, chunk: int = 1, tiles: tuple[int, int] = (1, 1)) -> Tensor:
        """[3, T, H, W] -> [z, (T-1)//4 + 1, h, w] float32, normalised; up to 3 frames beyond 4k+1 are left out.

        chunk: latent frames per call of the network. tiles: as for `encode_region`. The latent is the mean; nothing is
        drawn.
        Raises ValueError for sizes that are not multiples of the stride.
        """
        return self.encode_features(self.encode_region(video, chunk=chunk, tiles=tiles), chunk)

    def encode_first_frame(self, image: Tensor, frames: int, chunk: int = 1, tiles: tuple[int, int] = (1, 1)) -> Tensor:
        """Encode the clip that begins with `image` [3, H, W] and goes on in mid-grey (0): bit-identical to `encode`, at
        less than half the work (see `reuse_constant_tail`). tiles: as for `encode_region`."""
        return self.encode_features(self.encode_region(image[:, None], None, frames, chunk, tiles), chunk)

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

        video: the whole frames, [3, T, H, W]; followed by mid-grey ones if `frames` says that the clip is longer.
        tiles: rows and columns into which the region is divided, with less memory and the same numbers.
        """
        frames = video.shape[1] if frames is None else frames
        self._check_clip(video, frames, chunk)
        frame = Region(0, video.shape[2] // self.stride[1], 0, video.shape[3] // self.stride[2])
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
        stream = self._pixel_chunks(video, window.scaled(self.stride[1]), frames, chunk)
        for stage in self.encoder.stages(state):
            constant = stage.constant_after(constant)
            stream = reuse_constant_tail(stage.run, stream, constant)
        return region.cut(torch.cat(list(stream)), window)

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

    # Latents to pixels

    @torch.no_grad()
    def decode(self, latent: Tensor, chunk: int = 2, tiles: tuple[int, int] = (1, 1)) -> Iterator[Tensor]:
        """[z, L, h, w] -> chunks [3, t, H, W] float32 in [-1, 1], in order of time, 4L - 3 frames in all.

        chunk: latent frames per call of the network: more is faster and takes more memory.
        tiles: rows and columns into which the frame is divided; each tile is decoded for the whole clip before the
        next, with far less memory and the same numbers, but the first chunk comes when the last tile is done. Until
        then a GPU's pixels wait in host memory.
        """
        regions = Region.tiles(latent.shape[-2], latent.shape[-1], *tiles)
        features = self.decode_features(latent, chunk)
        if len(regions) == 1:
            yield from self.decode_region(features, regions[0], chunk)
            return
        size = 4 * latent.shape[1] - 3, latent.shape[2] * self.stride[1], latent.shape[3] * self.stride[2]
        video = torch.empty(3, *size, device=waiting_room(features.device))
        for region in regions:
            place = region.scaled(self.stride[1])
            tile = video[:, :, place.top : place.bottom, place.left : place.right]
            start = 0
            for part in self.decode_region(features, region, chunk):
                tile[:, start : start + part.shape[1]] = part
                start += part.shape[1]
        for part in video.split(4 * chunk, dim=1):
            yield part.to(features.device)

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

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The latents' mean and reciprocal deviation in float32. Both directions use the reciprocal, as the original
        does, which differs from the deviation in the last bit."""
        mean = torch.tensor(LATENT_MEAN[self.z_dim], device=device)
        return mean, 1.0 / torch.tensor(LATENT_STD[self.z_dim], device=device)

    def _check_clip(self, video: Tensor, frames: int, chunk: int) -> None:
        rows, columns = self.stride[1:]
        if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
            raise ValueError(f"a clip must be [3, frames, height, width], not {list(video.shape)}")
        if video.shape[2] % rows or video.shape[3] % columns:
            size = f"{video.shape[3]} x {video.shape[2]}"
            raise ValueError(f"width and height must be multiples of {rows}, not {size}")
        if frames < video.shape[1] or chunk < 1:
            raise ValueError(f"frames must be {video.shape[1]} or more and chunk 1 or more, not {frames} and {chunk}")


def waiting_room(device: torch.device) -> torch.device:
    """Where a whole clip's pixels wait that were made on `device`: a GPU's memory is for work."""
    return torch.device("cpu") if device.type == "cuda" else device
