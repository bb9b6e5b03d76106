"""The autoencoder: diffusers' AutoencoderKLWan, eight channels wide, trained on clips of the world.

Shapes: B clips, T frames, H rows, W columns, z latent channels, h, w the latent grid's rows and columns.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from torch import Tensor, nn

from examples.shapes.world import SIDE, draw, render

CROP = 32
# of the 16 channels of Wan2.1's latents, as released
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
NOISE = 0.1  # on the latents while training: what the transformer gets wrong, the decoder should forgive
LATENT_WEIGHT = 1e-4  # keeps the latents small, so that the noise counts


def build() -> AutoencoderKLWan:
    """An untrained one that takes whole clips at once and starts near to passing them through."""
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip
    take_whole_clips(vae)
    pass_through(vae)
    return vae


def take_whole_clips(vae: AutoencoderKLWan) -> None:
    """Replace the caches, which go chunk by chunk, by their closed form: one graph for a whole clip, less copied."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = MethodType(resample_clip, module)
        elif isinstance(module, WanResidualBlock):
            module.forward = MethodType(run_block, module)


def run_block(block: WanResidualBlock, x: Tensor, **_caches: object) -> Tensor:
    """[B, C, T, H, W], channels last in memory."""
    y = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        y = F.silu(F.rms_norm(y.movedim(1, -1), (y.shape[1],), norm.gamma.flatten(), 1e-24).movedim(-1, 1))
        y = F.conv3d(F.pad(y, (0, 0, 0, 0, 2, 0)), conv.weight, conv.bias, padding=(0, 1, 1))
    return y + block.conv_shortcut(x)


def resample_clip(layer: WanResample, x: Tensor, **_caches: object) -> Tensor:
    """[B, C, T, H, W]; frame 0 passes the layer's time convolution by."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat([x[:, :, :1], pairs.movedim(1, 3).flatten(2, 3)], 2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


@torch.no_grad()
def pass_through(vae: AutoencoderKLWan) -> None:
    """Start with weights that carry a clip through: the usual random ones predict the mean for thousands of steps."""
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight *= 0.2
            module.conv2.bias.zero_()
            if isinstance(module.conv_shortcut, WanCausalConv3d):
                carry(module.conv_shortcut, [(0, 0, 0)])
        elif isinstance(module, WanResample):
            convolution = module.resample[1]
            near = [(0, 0), (0, 1), (1, 0), (1, 1)] if module.mode.startswith("down") else [(1, 1)]
            carry(convolution, near)
            if module.mode == "downsample3d":
                carry(module.time_conv, [(1, 0, 0), (2, 0, 0)])
            elif module.mode == "upsample3d":
                for half in module.time_conv.weight.chunk(2):
                    half.mul_(0.3)[:, :, 2, 0, 0] += torch.eye(half.shape[1])
                module.time_conv.bias.zero_()
    for convolution in (vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in, vae.decoder.conv_out):
        carry(convolution, [(2, 1, 1)])
    vae.encoder.conv_out.weight[16:] *= 0
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        carry(convolution, [(0, 0, 0)], identity=True)


def carry(convolution: nn.Module, taps: list[tuple[int, ...]], identity: bool = False) -> None:
    """Let the taps together hold an orthogonal matrix (or the identity), and make what was there small beside it."""
    weight = convolution.weight
    outer, inner = weight.shape[:2]
    matrix = torch.eye(outer, inner) if identity else nn.init.orthogonal_(torch.empty(outer, inner))
    weight.mul_(0.0 if identity else 0.3)
    for tap in taps:
        weight[(slice(None), slice(None), *tap)] += matrix / len(taps)
    convolution.bias.zero_()


def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> raw means [B, z, L, h, w]."""
    return vae.quant_conv(vae.encoder(clips))[:, :16]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The inverse, without the clamp to [-1, 1], which has no gradient."""
    return vae.decoder(vae.post_quant_conv(latents))


def reconstruction_loss(vae: AutoencoderKLWan, progress: float, generator: torch.Generator) -> Tensor:
    """Two thirds of the stage on crops, four times as cheap, then on whole clips."""
    if progress < 0.65:
        clips = crops(render(draw(8, generator), generator), generator)
    else:
        clips = render(draw(3, generator), generator)
    clips = clips.contiguous(memory_format=torch.channels_last_3d)
    latents = encode(vae, clips)
    noisy = latents + NOISE * torch.randn(latents.shape, generator=generator)
    error = decode(vae, noisy) - clips
    # between square and absolute error: large areas and sharp edges both count
    return (error.square() + 1e-4).sqrt().mean() + error.square().mean() + LATENT_WEIGHT * latents.square().mean()


def crops(clips: Tensor, generator: torch.Generator) -> Tensor:
    """A window of each clip, on the grid of the latents."""
    corners = 8 * torch.randint((SIDE - CROP) // 8 + 1, (len(clips), 2), generator=generator)
    return torch.stack([c[..., y : y + CROP, x : x + CROP] for c, (y, x) in zip(clips, corners.tolist(), strict=True)])


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """The kernels inside the network."""
    return parameter.ndim > 3 and parameter[0].numel() > 1 and "conv_in" not in name and "conv_out" not in name


@torch.no_grad()
def fold(vae: AutoencoderKLWan, clips: Tensor) -> None:
    """Move the latents to the released mean and deviation of each channel, in the two 1x1x1 convolutions at the ends.

    The program takes (latent - mean) / deviation with the released constants; on these clips that is then standard.
    """
    latents = torch.cat([encode(vae, part) for part in clips.split(8)])
    deviation, mean = torch.std_mean(latents, (0, 2, 3, 4))
    scale = torch.tensor(LATENT_STD) / deviation
    offset = torch.tensor(LATENT_MEAN) - mean * scale
    enter, leave = vae.quant_conv, vae.post_quant_conv
    enter.weight[:16] *= scale[:, None, None, None, None]
    enter.bias[:16] = enter.bias[:16] * scale + offset
    leave.bias -= (leave.weight[..., 0, 0, 0] * (offset / scale)).sum(1)
    leave.weight /= scale[:, None, None, None]


def normalised(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> what the transformer sees, [B, z, L, h, w]."""
    return (encode(vae, clips) - column(LATENT_MEAN)) / column(LATENT_STD)


def pixels(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The inverse of `normalised`, in [-1, 1]."""
    return decode(vae, latents * column(LATENT_STD) + column(LATENT_MEAN)).clamp(-1, 1)


def column(constants: tuple[float, ...]) -> Tensor:
    return torch.tensor(constants)[:, None, None, None]
