"""The video autoencoders' decode: what it costs at full size, and how long it takes beside diffusers'.

    python -m benchmarks.vae [--size 160x144] [--frames 5] [--repeats 3] [--compiled]

The counts are of 1280x720x81 (2.1) and 1280x704x121 (2.2) in float32, on meta tensors: a fused norm or attention is one
operation, as on a GPU; weights are not part of the peak. The times are of the real widths with random weights, at a
small size and on a GPU at full size, in turn in one process; loading and moving the result are excluded.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.counters import CostCounter, FlopCounterMode
from benchmarks.measure import NEEDS_A_GPU, Row, command_parser, interleaved, randomise, report
from benchmarks.transformer import matmul_rate
from wan.checkpoints.key_mapping import vae_name
from wan.configs.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.distributed.vae_parallel import divide
from wan.modules.vae import VAES, WanVAE
from wan.modules.vae_layers import STRIPS, Region

FULL_SIZE = {"2.1": (16, 21, 90, 160), "2.2": (48, 31, 44, 80)}  # latents
WIDTH_STRIDE = {"2.1": 8, "2.2": 16}
SMALL_SIZE = {"2.1": "160x144", "2.2": "112x112"}  # below, PyTorch does not give oneDNN all convolutions
CACHE = 40 * 10**6  # bytes: an A100's second, the smallest of the data centre cards

KINDS = {"2.1": VAES[16], "2.2": VAES[48]}


def gpu_works() -> dict[str, Callable[[], list[Row]]]:
    """Measurements on a GPU, by name."""
    return {f"G7 VAE {kind}": partial(full_size, kind) for kind in KINDS}


def works() -> dict[str, Callable[[], list[Row]]]:
    """Measurements on any machine, by name."""
    timed = {f"C4 VAE {kind}": partial(time_decode, kind) for kind in KINDS}
    return {
        "C4 VAE counted": counted_rows,
        **timed,
        **{f"small VAE {kind}": partial(time_small, kind) for kind in KINDS},
    }


def counted_rows() -> list[Row]:
    whole, plain = count_decode("2.1"), count_decode("2.1", cache=0)
    tiled, shared = count_decode("2.1", tiles=(2, 2)), count_decode("2.1", processes=8)
    limit = "original 7,353 GB; must 4,500, good 3,000, best 2,000 GB; issue 2,300 GB"
    return [
        Row("C4 decode of Wan2.1's VAE, 1280x720x81, float32 (static; what is used up at once stays in a cache of "
            "40 MB)", whole.words(), limit),
        Row("the same without a cache", plain.words()),
        Row("the same in 2x2 tiles, equal numbers", tiled.words()),
        Row("the same on one of 8 processes", shared.words()),
        Row("C4 decode of Wan2.2's VAE, 1280x704x121, float32 (static)", count_decode("2.2").words()),
    ]  # fmt: skip


def full_size(kind: str) -> list[Row]:
    """G7."""
    limit = "must 6 / 4, good 4.5 / 3, best 3.5 / 2.2 s (fp32 / bf16)" if kind == "2.1" else ""
    _, length, height, width = FULL_SIZE[kind]
    size, frames = f"{width * WIDTH_STRIDE[kind]}x{height * WIDTH_STRIDE[kind]}", 4 * length - 3
    if not torch.cuda.is_available():
        return [Row(f"G7 decode of Wan{kind}'s VAE, {size}x{frames}", NEEDS_A_GPU, limit)]
    return [row._replace(what=f"G7 {row.what}", limit=limit) for row in time_decode(kind, 3, size, frames)]


def main() -> None:
    parser = command_parser(__doc__, repeats=3)
    parser.add_argument("--size", default=None, metavar="WIDTHxHEIGHT", help="of the timed video; default: small")
    parser.add_argument("--frames", type=int, default=None, help="of the timed video, 4n + 1; default 5")
    parser.add_argument("--compiled", action="store_true", help="also diffusers' decoder compiled: minutes on a CPU")
    given = vars(parser.parse_args())
    timed = [row for kind in KINDS for row in (*time_decode(kind, **given), *time_small(kind, given["repeats"]))]
    report([*counted_rows(), *timed])


class Cost(NamedTuple):
    traffic: int  # bytes
    operations: int
    flops: int
    peak: int  # bytes alive at once, weights aside

    def words(self) -> str:
        return f"**{self.traffic / 1e9:,.0f} GB**, {self.flops / 1e12:,.0f} TFLOP, peak {self.peak / 2**30:.1f} GiB"


def count_decode(
    kind: str,
    chunk: int = 2,
    tiles: tuple[int, int] = (1, 1),
    processes: int = 1,
    cache: int = CACHE,
    length: int | None = None,
) -> Cost:
    """Cost of one decode at full size on a GPU, or of the busiest of several; nothing is computed.

    length: of the latent, instead of the full one.
    """
    channels, full, height, width = FULL_SIZE[kind]
    vae, latent = released(kind), torch.empty(channels, length or full, height, width, device="meta")

    def decode() -> None:
        if processes == 1:
            parts = vae.decode(latent, chunk, tiles)
        else:
            grid = Region(0, height, 0, width)
            busiest = max(divide(height, width, processes), key=lambda r: r.grown(3, 3, grid).area)
            parts = vae.decode_region(vae.decode_features(latent, chunk), busiest, chunk)
        for part in parts:
            del part

    # One after the other: the second counter takes norms apart.
    with torch.device("meta"), torch.inference_mode():
        with patch.dict(STRIPS, meta=STRIPS["cuda"]), CostCounter(cache) as cost:
            decode()
        with FlopCounterMode(display=False) as work:
            decode()
    return Cost(cost.traffic, cost.calls, work.get_total_flops(), cost.peak)


def released(kind: str) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(*KINDS[kind])
    vae.use_channels_last()
    return vae


@torch.no_grad()
def time_decode(
    kind: str, repeats: int = 3, size: str | None = None, frames: int | None = None, compiled: bool = False
) -> list[Row]:
    """Our decode, in float32 and bf16, beside diffusers' on the same weights, and how far the videos are apart."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, height = map(int, (size or SMALL_SIZE[kind]).split("x"))
    stride, length = WIDTH_STRIDE[kind], ((frames or 5) - 1) // 4 + 1
    torch.manual_seed(0)
    vae = WanVAE(*KINDS[kind])
    randomise(vae)
    half = copy.deepcopy(vae.to(device))
    half.decode_in(torch.bfloat16)
    peer = to_diffusers(vae).to(device)
    for each in (vae, half):
        each.use_channels_last()
    latent = torch.randn(vae.z_dim, length, height // stride, width // stride, device=device)
    mean, std = (torch.tensor(t[vae.z_dim], device=device)[:, None, None, None] for t in (LATENT_MEAN, LATENT_STD))

    def theirs() -> Tensor:
        return peer.decode((latent * std + mean)[None]).sample[0]

    found, expected = decode(vae, latent), theirs()
    distance = -10 * (decode(half, latent) - found).square().mean().div(4).log10().item()
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # other work does not count
    full, low, other = interleaved(
        [partial(decode, vae, latent), partial(decode, half, latent), theirs], repeats, clock=clock
    )
    counted = released(kind)
    with FlopCounterMode(display=False) as work:
        torch.cat(list(counted.decode(latent.to("meta"))), dim=1)
    rate = matmul_rate(device, torch.float32, 2048 if device.type == "cpu" else 8192, clock)
    words = f"decode of Wan{kind}'s VAE, {width}x{height}x{4 * length - 3}, real widths, {seconds_of(device)}"
    difference = f"largest difference {(found - expected).abs().max().item():.0e}"
    peers = [f"diffusers {other:.2f} s"]
    if compiled:
        peer.decoder = torch.compile(peer.decoder)
        (fast,) = interleaved([theirs], repeats, clock=clock)
        peers.append(f"compiled {fast:.2f} s ({fast / full:.2f} x ours)")
    share = f"{work.get_total_flops() / full / rate:.0%} of this machine's rate for float32 matrix products"
    ratio = f"{full:.2f} s (**{other / full:.2f} x**), {share}, {difference}"
    return [
        Row(f"{words}, float32", ratio, "1.3 x diffusers", ", ".join(peers)),
        Row("the same, `--vae_dtype bf16`", f"{low:.2f} s (**{other / low:.2f} x**), {distance:.1f} dB", "", peers[0]),
    ]


def decode(vae: WanVAE, latent: Tensor) -> Tensor:
    return torch.cat(list(vae.decode(latent)), dim=1)


@torch.no_grad()
def time_small(kind: str, repeats: int = 3) -> list[Row]:
    """Encode and decode of small videos on a CPU beside diffusers', where PyTorch does not give oneDNN all layers."""
    torch.manual_seed(0)
    vae = WanVAE(*KINDS[kind])
    randomise(vae)
    peer = to_diffusers(vae)
    vae.use_channels_last()
    rows = []
    for width, height, frames in ((64, 64, 17), (128, 128, 5), (160, 144, 5)):
        video = torch.rand(3, frames, height, width) * 2 - 1
        latent = vae.encode(video)
        works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "encode": (partial(vae.encode, video), partial(peer.encode, video[None])),
            "decode": (partial(decode, vae, latent), partial(peer.decode, latent[None])),
        }
        for name, pair in works.items():
            ours, theirs = interleaved(list(pair), repeats, clock=time.process_time)
            what = f"{name} of Wan{kind}'s VAE, {width}x{height}x{frames}, real widths, CPU seconds, float32"
            rows.append(Row(what, f"{ours:.2f} s (**{theirs / ours:.2f} x**)", "1.2 x diffusers", f"{theirs:.2f} s"))
    return rows


def seconds_of(device: torch.device) -> str:
    return "wall seconds" if device.type == "cuda" else "CPU seconds"


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
