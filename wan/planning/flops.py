"""Floating-point operations of the text encoder and the autoencoders in closed form; the transformer's are `Network`'s.

A multiplication and an addition are two. Products with weights and of attention count, which is all but a hundredth.
Regions and grids are of latent cells; of a region that is coded by itself its rim counts too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import DECODER_RIM, ENCODER_RIM, Coder, WanVAE
from wan.modules.vae_layers import ClipState, Downsample, FrameAttention, Region, Upsample

DOUBLING = 16 / 9  # weights of the kernel of `doubling` for each one of the kernel it is made of


def text_operations(encoder: UMT5Encoder, tokens: int) -> float:
    """One product with every weight but the table's; attention over a few hundred tokens does not count."""
    weights = sum(p.numel() for name, p in encoder.named_parameters() if name != "token_embedding.weight")
    return 2.0 * weights * tokens


def decode_operations(vae: WanVAE, latent: Sequence[int], regions: Sequence[Region] | None = None) -> float:
    """Decoding a `latent` [C, f, h, w]: the middle of whole frames, then each region (None: the frame is one)."""
    decoder, frames, frame = vae.decoder, latent[1], Region(0, latent[2], 0, latent[3])
    whole = _products(frames * frame.area, vae.conv2, decoder.conv1) + _middle(decoder, frames, frame.area)
    return whole + sum(_decoded(vae, frames, frame, region) for region in regions or [frame])


def _decoded(vae: WanVAE, frames: int, frame: Region, region: Region) -> float:
    """`Decoder.finish` of one region over all frames."""
    total, area = 0.0, 0
    for level, rim in zip(vae.decoder.levels, DECODER_RIM, strict=True):
        area = region.grown(rim, rim, frame).area
        for layer in level.layers:
            if not isinstance(layer, Upsample):
                total += _products(frames * area, layer)
                continue
            if layer.time_conv:
                total += _products((frames - 1) * area, layer.time_conv)
                frames = 2 * frames - 1
            total += DOUBLING * _products(frames * area, layer.resample)
            region, frame = region.scaled(2), frame.scaled(2)
    return total + _products(frames * area, vae.decoder.head)


def encode_operations(vae: WanVAE, latent: Sequence[int], regions: Sequence[Region] | None = None) -> float:
    """Encoding a picture as the start of a clip of this `latent` [C, f, h, w]; regions as for `decode_operations`."""
    encoder, frames, frame = vae.encoder, latent[1], Region(0, latent[2], 0, latent[3])
    whole = _products(frames * frame.area, encoder.head, vae.conv1) + _middle(encoder, frames, frame.area)
    return whole + sum(_encoded(vae, frames - 1, region.grown(*ENCODER_RIM, frame)) for region in regions or [frame])


def _encoded(vae: WanVAE, chunks: int, window: Region) -> float:
    """The picture's chunk of one frame, and the `chunks` of four after it until a stage's output is constant (see
    `reuse_constant_tail`)."""
    encoder, scale = vae.encoder, vae.stride[1] // vae.patch
    rows, columns = scale * (window.bottom - window.top), scale * (window.right - window.left)
    layers: list[list[nn.Module]] = [[encoder.conv1], *(level.layers for level in encoder.levels)]
    total, constant, length = 0.0, 1, 4  # length: of a chunk where the stage begins
    for stage, inside in zip(encoder.stages(ClipState()), layers, strict=True):
        constant = stage.constant_after(constant)
        shorter = length // 2 if stage.halves_time else length  # where it ends
        running = min(chunks, 1 - (1 - constant) // shorter)
        for layer in inside:
            if not isinstance(layer, Downsample):
                total += _products((1 + running * length) * rows * columns, layer)
                continue
            rows, columns = rows // 2, columns // 2
            total += _products((1 + running * length) * (rows + 1) * (columns + 1), layer.resample)
            if layer.time_conv:
                total += _products(running * shorter * rows * columns, layer.time_conv)
        length = shorter
    return total


def _middle(coder: Coder, frames: int, area: int) -> float:
    """The part with attention over the `area` of each frame."""
    attention = coder.middle[1]
    assert isinstance(attention, FrameAttention)
    return _products(frames * area, coder.middle) + 4.0 * frames * area**2 * attention.proj.out_channels


def _products(positions: int, *modules: nn.Module) -> float:
    """Convolutions at `positions`: one product with each weight."""
    found = [part for module in modules for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
    return 2.0 * positions * sum(conv.weight.numel() for conv in found)
