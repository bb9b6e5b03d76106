"""The video autoencoders' decode: what it costs at full size, and how long it takes beside diffusers'.

    python -m benchmarks.vae [--kind 2.1] [--chunk 2] [--tiles 2x2] [--size 96x64] [--frames 9] [--repeats 3]

The counts are of 1280x720x81 (2.1) and 1280x704x121 (2.2) in float32, on fake tensors: a fused norm or attention is one
operation, as on a GPU; weights are not part of the peak. The wall times are of the real widths with random weights, at
a small size on a CPU and at full size on a GPU, in turn in one process; loading and moving the result are excluded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counters import CostCounter, FlopCounterMode
from benchmarks.measure import interleaved, machine, table
from lightning.diffusers_names import vae_name
from lightning.latents import LATENT_MEAN, LATENT_STD
from wan.distributed.vae_parallel import area, divide
from wan.doctor.counts import VAES as KINDS
from wan.modules.causal_conv import norm_silu
from wan.modules.vae import WanVAE
from wan.modules.vae_coders import Region

FULL_SIZE = {"2.1": (16, 21, 90, 160), "2.2": (48, 31, 44, 80)}  # latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help="one of the two; default: both")
    parser.add_argument("--chunk", type=int, default=2, help="latent frames per call")
    parser.add_argument("--tiles", default="2x2", metavar="ROWSxCOLUMNS", help="of the tiled count")
    parser.add_argument("--size", default=None, metavar="WIDTHxHEIGHT", help="of the timed video; on a GPU full size")
    parser.add_argument("--frames", type=int, default=9, help="of the timed video, 4n + 1")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    rows, columns = map(int, args.tiles.split("x"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts: list[Sequence[str]] = [("VAE", "mode", "traffic, GB", "operations", "TFLOP", "peak live, GiB")]
    times: list[Sequence[str]] = [
        ("VAE", "latent", "ours, s", "diffusers, s", "speed", "largest difference", "peak GB")
    ]
    for kind in [args.kind] if args.kind else KINDS:
        modes = (
            ("whole", (1, 1), 1, False),
            ("whole, norm and SiLU compiled", (1, 1), 1, True),
            (f"tiles {args.tiles}", (rows, columns), 1, False),
            ("one of 8 processes", (1, 1), 8, False),
        )
        for mode, tiles, processes, fused in modes:
            cost = count_decode(kind, args.chunk, tiles, processes, fused)
            numbers = f"{cost.traffic / 1e9:,.0f}", f"{cost.operations:,}", f"{cost.flops / 1e12:,.0f}"
            counts.append((kind, mode, *numbers, f"{cost.peak / 2**30:.1f}"))
        shape = FULL_SIZE[kind]
        if args.size or device.type == "cpu":
            width, height = map(int, (args.size or "96x64").split("x"))
            stride = 8 if kind == "2.1" else 16
            shape = (shape[0], (args.frames - 1) // 4 + 1, height // stride, width // stride)
        times.append((kind, "x".join(map(str, shape)), *time_decode(kind, shape, args.chunk, args.repeats, device)))
    table("C4: static cost of a full-size float32 decode (original, 2.1: 7,353 GB; must 4,500, good 3,000)", counts)
    table(f"decode beside diffusers, same weights, float32, on {device}", times)


class Cost(NamedTuple):
    traffic: int  # bytes
    operations: int
    flops: int
    peak: int  # bytes alive at once, weights aside


def count_decode(kind: str, chunk: int, tiles: tuple[int, int], processes: int = 1, fused: bool = False) -> Cost:
    """What one decode at full size costs, or the share of the busiest of several processes; nothing is computed.

    fused: norm and SiLU compiled into one operation."""

    def decode() -> None:
        vae, latent = WanVAE(*KINDS[kind]), torch.empty(FULL_SIZE[kind])
        vae.use_channels_last()
        counter = CostCounter()
        if fused:
            vae.use_norm_silu(counter.fused(norm_silu))
        with counter:
            if processes == 1:
                parts = vae.decode(latent, chunk, tiles)
            else:
                grid = Region(0, latent.shape[2], 0, latent.shape[3])
                busiest = max(divide(grid.bottom, grid.right, processes), key=lambda r: area(r.grown(3, 3, grid)))
                parts = vae.decode_region(vae.decode_features(latent, chunk), busiest, chunk)
            for part in parts:
                del part
        costs.append(counter)

    costs: list[CostCounter] = []
    with FakeTensorMode(), torch.inference_mode():
        decode()
    with torch.device("meta"), FlopCounterMode(display=False) as work:
        decode()
    return Cost(costs[0].traffic, costs[0].calls, work.get_total_flops(), costs[0].peak)


@torch.no_grad()
def time_decode(
    kind: str, shape: tuple[int, int, int, int], chunk: int, repeats: int, device: torch.device
) -> tuple[str, ...]:
    """Median seconds of our decode and of diffusers' on the same weights, and how far the videos are apart."""
    torch.manual_seed(0)
    vae = WanVAE(*KINDS[kind]).to(device)
    peer = to_diffusers(vae).to(device)
    vae.use_channels_last()
    latent = torch.randn(shape, device=device)
    mean, std = (torch.tensor(t[vae.z_dim], device=device)[:, None, None, None] for t in (LATENT_MEAN, LATENT_STD))

    def ours() -> Tensor:
        return torch.cat(list(vae.decode(latent, chunk)), dim=1)

    def theirs() -> Tensor:
        return peer.decode((latent * std + mean)[None]).sample[0]

    difference = (ours() - theirs()).abs().max().item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours()
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else ""
    seconds, other = interleaved([ours, theirs], repeats)
    return f"{seconds:.2f}", f"{other:.2f}", f"{other / seconds:.2f}", f"{difference:.1e}", peak


def to_diffusers(vae: WanVAE) -> Any:
    """diffusers' AutoencoderKLWan with the same weights."""
    nested = vae.patch == 2
    shape = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16} if nested else {}
    with torch.device("meta"):
        peer = AutoencoderKLWan(
            base_dim=vae.encoder.conv1.out_channels,
            decoder_base_dim=vae.decoder.head["2"].in_channels,
            z_dim=vae.z_dim,
            latents_mean=LATENT_MEAN[vae.z_dim],
            latents_std=LATENT_STD[vae.z_dim],
            is_residual=nested,
            **shape,
        )
    tensors = {vae_name(name): tensor.clone() for name, tensor in vae.state_dict().items()}
    peer.load_state_dict(tensors, assign=True)
    return peer.eval()


if __name__ == "__main__":
    main()
