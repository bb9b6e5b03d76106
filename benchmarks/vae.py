"""The video autoencoders' decode: what it costs at full size, and how long it takes beside diffusers'.

    python -m benchmarks.vae [--kind 2.1] [--chunk 2] [--tiles 2x2] [--size 96x64] [--frames 9] [--repeat 3]

The counts are of 1280x720x81 (2.1) and 1280x704x121 (2.2) in float32, on fake tensors: a fused norm or attention is one
operation, as on a GPU; weights are not part of the peak. The wall times are of the real widths with random weights, at
the small size given, in turn in one process; compiling, loading and moving the result are excluded.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counters import CostCounter, FlopCounterMode
from wan.modules.vae import LATENT_MEAN, LATENT_STD, WanVAE

KINDS = {"2.1": (16, 96, 96, False), "2.2": (48, 160, 256, True)}  # the arguments of WanVAE
FULL_SIZE = {"2.1": (16, 21, 90, 160), "2.2": (48, 31, 44, 80)}  # latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help="one of the two; default: both")
    parser.add_argument("--chunk", type=int, default=2, help="latent frames per call")
    parser.add_argument("--tiles", default="2x2", metavar="ROWSxCOLUMNS", help="of the tiled count")
    parser.add_argument("--size", default="96x64", metavar="WIDTHxHEIGHT", help="of the timed video")
    parser.add_argument("--frames", type=int, default=9, help="of the timed video, 4n + 1")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, columns = map(int, args.tiles.split("x"))
    width, height = map(int, args.size.split("x"))
    device = torch.device(args.device)
    report: dict[str, object] = {}
    for kind in [args.kind] if args.kind else KINDS:
        report[kind] = {
            "whole": count_decode(kind, args.chunk, (1, 1)),
            f"tiles {args.tiles}": count_decode(kind, args.chunk, (rows, columns)),
            "wall": time_decode(kind, (args.frames, height, width), args.chunk, args.repeat, device),
        }
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    report["settings"] = {**vars(args), "torch": torch.__version__, "machine": machine}
    print(json.dumps(report, indent=2))


def count_decode(kind: str, chunk: int, tiles: tuple[int, int]) -> dict[str, float]:
    """Traffic, operations, work and peak of one decode at full size; nothing is computed."""
    with FakeTensorMode(), torch.inference_mode():
        vae = WanVAE(*KINDS[kind])
        vae.use_channels_last()
        latent = torch.empty(FULL_SIZE[kind])
        with CostCounter() as cost:
            for part in vae.decode(latent, chunk, tiles):
                del part
    with torch.device("meta"), FlopCounterMode(display=False) as work:
        for part in WanVAE(*KINDS[kind]).decode(torch.empty(FULL_SIZE[kind]), chunk, tiles):
            del part
    return {
        "traffic_gigabytes": round(cost.traffic / 1e9),
        "operations": cost.calls,
        "teraflop": round(work.get_total_flops() / 1e12),
        "peak_live_gibibytes": round(cost.peak / 2**30, 1),
    }


def time_decode(
    kind: str, size: tuple[int, int, int], chunk: int, repeat: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of our decode and of diffusers' on the same weights, and how far the videos are apart."""
    torch.manual_seed(0)
    vae = WanVAE(*KINDS[kind]).to(device)
    peer = to_diffusers(vae).to(device)
    vae.use_channels_last()
    strides = vae.stride
    grid = (size[0] - 1) // strides[0] + 1, size[1] // strides[1], size[2] // strides[2]
    latent = torch.randn(vae.z_dim, *grid, device=device)
    mean, std = (torch.tensor(t[vae.z_dim], device=device)[:, None, None, None] for t in (LATENT_MEAN, LATENT_STD))
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: torch.cat(list(vae.decode(latent, chunk)), dim=1),
        "diffusers": lambda: peer.decode((latent * std + mean)[None]).sample[0],
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        videos = {name: run() for name, run in runs.items()}
        for _ in range(repeat):
            for name, run in runs.items():
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    return {
        "ours_seconds": round(seconds["ours"], 4),
        "diffusers_seconds": round(seconds["diffusers"], 4),
        "speedup": round(seconds["diffusers"] / seconds["ours"], 2),
        "largest_difference": (videos["ours"] - videos["diffusers"]).abs().max().item(),
        "largest_value": videos["diffusers"].abs().max().item(),
    }


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
    tensors = {diffusers_name(name): tensor.clone() for name, tensor in vae.state_dict().items()}
    peer.load_state_dict(tensors, assign=True)
    return peer.eval()


def diffusers_name(name: str) -> str:
    """What diffusers calls a parameter of the checkpoint."""
    name = re.sub(r"^conv1\b", "quant_conv", name)
    name = re.sub(r"^conv2\b", "post_quant_conv", name)
    name = re.sub(r"^(encoder|decoder)\.conv1\b", r"\1.conv_in", name)
    name = name.replace(".head.0.", ".norm_out.").replace(".head.2.", ".conv_out.")
    name = re.sub(
        r"\.middle\.(\d)", lambda m: f".mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[int(m[1])]}", name
    )
    for layer, own in {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}.items():
        name = name.replace(f".residual.{layer}.", f".{own}.")
    name = name.replace(".shortcut.", ".conv_shortcut.")
    sampler = ".resample." in name or ".time_conv." in name
    if nested := re.search(r"\.(down|up)samples\.(\d)\.\1samples\.(\d)\.", name):
        way, level, layer = nested.groups()
        own = f"{way}sampler" if sampler else f"resnets.{layer}"
        return name.replace(nested[0], f".{way}_blocks.{level}.{own}.")
    if flat := re.search(r"\.upsamples\.(\d+)\.", name):
        block, resnet = divmod(int(flat[1]), 4)
        own = "upsamplers.0" if sampler else f"resnets.{resnet}"
        return name.replace(flat[0], f".up_blocks.{block}.{own}.")
    return name.replace(".downsamples.", ".down_blocks.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
