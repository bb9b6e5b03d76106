"""The video autoencoder over the ranks of a sequence group: each takes a region of the frame, with exact results.

Shapes: L latent frames, h, w the latent grid, H, W the frame, t frames of a chunk, C channels. Every rank computes the
layers that look at whole frames (attention, a few percent of the work), the others for its region and their rim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from wan.distributed.mesh import Mesh
from wan.distributed.ulysses import all_gather
from wan.modules.vae import AS_IS, Convert, WanVAE
from wan.modules.vae_layers import Region


class SplitVAE:
    """The interface of a `WanVAE`, run by all ranks of a sequence group together."""

    def __init__(self, vae: WanVAE, mesh: Mesh) -> None:
        assert mesh.sequence is not None, "a rank alone uses the WanVAE itself"
        self.vae, self.mesh = vae, mesh
        self.rank, self.size = mesh.team.rank, mesh.layout.sequence
        self.z_dim, self.stride, self.device = vae.z_dim, vae.stride, vae.conv2.weight.device

    def encode(
        self, video: Tensor, chunk: int = 1, tiles: tuple[int, int] = (1, 1), frames: int | None = None
    ) -> Tensor:
        """[3, T, H, W], followed by grey up to `frames` -> [z, L, h, w], on every rank."""
        height, width = video.shape[-2] // self.stride[1], video.shape[-1] // self.stride[2]
        regions = divide(height, width, self.size)
        # a rank without a region computes the first one: it needs the features' shape to take part
        mine = regions[self.rank] if self.rank < len(regions) else regions[0]
        part = self.vae.encode_region(video, mine, frames, chunk, fitting(tiles, mine))
        length, channels = part.shape[0], part.shape[-1]
        sent = padded(part, max(region.area for region in regions) * length * channels)
        received = sent.new_empty(self.size * len(sent))
        all_gather(received, sent, self.mesh)
        features = part.new_empty(length, height, width, channels)
        for region, flat in zip(regions, received.split(len(sent)), strict=False):
            target = region.cut(features, Region(0, height, 0, width))
            target.copy_(flat[: target.numel()].view(target.shape))
        return self.vae.encode_features(features, chunk)

    def decode(
        self, latent: Tensor, chunk: int = 2, tiles: tuple[int, int] = (1, 1), convert: Convert = AS_IS
    ) -> Iterator[Tensor]:
        """[z, L, h, w], the same on every rank -> chunks [3, t, H, W] on rank 0; the others yield none.
        Every rank must run the iterator to its end, in `Team.all_or_none`: each chunk is an exchange."""
        (height, width), group = latent.shape[-2:], self.mesh.sequence
        assert group is not None, "a rank alone uses the WanVAE itself"
        regions, frame = divide(height, width, self.size), Region(0, height, 0, width).scaled(self.stride[1])
        windows = [region.scaled(self.stride[1]) for region in regions]
        counts = [4 * len(part) for part in torch.empty(latent.shape[1]).split(chunk)]
        counts[0] -= 3
        nothing = torch.zeros(0, dtype=convert(torch.zeros(1)).dtype, device=self.device)
        parts = iter([nothing] * len(counts))  # of a rank without a region
        if self.rank < len(regions):
            region = regions[self.rank]
            parts = self.vae.decode(latent, chunk, fitting(tiles, region), region, convert)
        for part, count in zip(parts, counts, strict=True):
            sent = padded(part.to(self.device), 3 * count * max(window.area for window in windows))
            received = [] if self.rank else [torch.empty_like(sent) for _ in range(self.size)]
            with self.mesh.team.exchange():
                dist.gather(sent, received or None, dst=dist.get_global_rank(group, 0), group=group)
            if self.rank == 0:
                video = received[0].new_empty(3, count, *frame.sides)
                for window, flat in zip(windows, received, strict=False):
                    target = video[:, :, window.top : window.bottom, window.left : window.right]
                    target.copy_(flat[: target.numel()].view(target.shape))
                yield video


def encode_peak(vae: WanVAE, shape: tuple[int, int, int], ranks: int, tiles: tuple[int, int] = (1, 1)) -> int:
    """Peak bytes on the busiest of `ranks` that encode a clip, without the weights; approximate. shape: L, h, w.
    At the end each holds the received features, the whole made of them, and the middle's results."""
    regions = divide(*shape[1:], ranks)
    largest = max(regions, key=lambda region: region.area)
    gathered = 4 * vae.encoded_bytes(math.prod(shape)) + 2 * vae.encoded_bytes(shape[0] * largest.area)
    busiest = max(vae.encode_peak(shape, fitting(tiles, region), region) for region in regions)
    return max(busiest, gathered if ranks > 1 else 0)


def decode_peak(
    vae: WanVAE, shape: tuple[int, int, int, int], ranks: int, chunk: int = 2, tiles: tuple[int, int] = (1, 1)
) -> int:
    """Peak bytes on the busiest of `ranks` that decode a latent [z, L, h, w], without the weights.
    Rank 0 also holds the frames of a chunk twice: as received, and put together."""
    _, length, height, width = shape
    regions = divide(height, width, ranks)
    frames = 4 * min(chunk, length) * height * width * vae.stride[1] * vae.stride[2]
    busiest = max(vae.decode_peak(shape, chunk, fitting(tiles, region), region) for region in regions)
    return busiest + (2 * 3 * frames * torch.float32.itemsize if ranks > 1 else 0)


def fitting(tiles: tuple[int, int], region: Region) -> tuple[int, int]:
    """At most one row and column of tiles for each of the region's cells."""
    return min(tiles[0], region.bottom - region.top), min(tiles[1], region.right - region.left)


def divide(height: int, width: int, ranks: int) -> list[Region]:
    """At most one region of a grid per rank, by the division into rows and columns with the least work."""
    frame = Region(0, height, 0, width)

    def work(shape: tuple[int, int]) -> int:  # with a rim of three latent cells, that of the levels with most work
        return max(region.grown(3, 3, frame).area for region in frame.divided(*shape))

    shapes = [(r, c) for r in range(1, min(ranks, height) + 1) for c in range(1, min(ranks // r, width) + 1)]
    return frame.divided(*min(shapes, key=work))


def padded(x: Tensor, length: int) -> Tensor:
    """The values of `x` in a row, padded with zeros."""
    return F.pad(x.flatten(), (0, length - x.numel()))
