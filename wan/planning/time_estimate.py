"""Seconds to expect of a video: operations counted from the networks, and bytes of files, divided by measured rates.

`python -m wan.doctor` measures the rates and keeps them for the plans of this machine. The seconds leave out
element-wise work between the products, and writing the mp4.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from wan.distributed.mesh import Layout
from wan.distributed.vae_parallel import divide, fitting
from wan.jobs.job import Job, chains
from wan.modules import vae_layers
from wan.modules.vae import WanVAE
from wan.planning.plan import Plan, VideoPlan, video_kind
from wan.sampling import Step
from wan.utils.accelerator import Accelerator
from wan.utils.files import cache_folder, write_file

MATMUL, ATTENTION, VAE = "matmul", "attention", "VAE"  # floating-point operations a second
COPY, PINNED, PAGEABLE, DISK = "device copy", "host to device, pinned", "host to device, pageable", "disk read"  # bytes
EXCHANGE = "exchange"  # bytes that a process sends, while all of them do
NEEDED_RATES = (MATMUL, ATTENTION, VAE, DISK)
RATES_FILE = "rates.json"
DOUBLING = 16 / 9  # weights of the kernel of `doubling` for each one of the kernel it is made of


@dataclass(frozen=True)
class Seconds:
    """Seconds of one video by stage, the longer of computing and reading; `read`: bytes of the experts' files.
    again: `denoise` in the videos after the first one, whose weights may be there already."""

    text: float
    image: float
    denoise: float
    decode: float
    again: float
    read: int

    @property
    def first(self) -> float:
        return self.text + self.image + self.denoise + self.decode

    @property
    def next(self) -> float:
        return self.image + self.again + self.decode


def expect(plan: Plan, todo: Sequence[Job]) -> dict[str, Any] | None:
    """Seconds of a run that makes these jobs: its longest video by stage, and all of it; None without rates or jobs.
    communication: whether time to send is included."""
    rates = kept_rates(plan.device)
    if rates is None or not todo:
        return None
    plans = plan.variants or {todo[0].variant: plan}
    found = {(n, kind): seconds(each, video, rates) for n, each in plans.items() for kind, video in each.videos.items()}
    shares = (chains(todo)[group :: plan.layout.data] for group in range(plan.layout.data))
    spent = [[found[job.variant, video_kind(job)] for chain in share for job in chain] for share in shares]
    wholes = [sum(one.next for one in made) + max(one.first - one.next for one in made) for made in spent if made]
    longest = asdict(max((one for made in spent for one in made), key=lambda one: one.first))
    stages = {name: longest[name] for name in ("text", "image", "denoise", "decode") if longest[name]}
    communication = plan.layout.sequence == 1 or EXCHANGE in rates
    return {"stages": stages, "whole": max(wholes), "communication": communication}


def seconds(plan: Plan, video: VideoPlan, rates: Mapping[str, float]) -> Seconds:
    """Seconds of one video. Processes that make it together share tokens and frames evenly, and read the same files."""
    ranks, budget, vae = plan.layout.sequence, video.budget, plan.checkpoint.vae.module
    # a block that streams, or is gathered from the other processes, comes once for both passes of a step
    batch_guidance = budget.batch_guidance if budget else plan.request.dit_fsdp
    steps = steps_of(plan, video)
    forwards = Counter(step.expert for step in steps for _ in range(1 + step.guided))
    passes = Counter(step.expert for step in steps) if batch_guidance else forwards
    read = 0.0
    for name, count in passes.items():
        share = 1.0  # of the expert's file: blocks that stay come once, the others once in each forward
        if budget and not budget.resident:
            sizes, stay = budget.experts[name], budget.staying(budget.experts[name])
            share = (stay + (sizes.blocks - stay) * count) * sizes.block_bytes / plan.weight_bytes[f"{name} expert"]
        read += share * plan.file_bytes[name]
    feed = min(rates[DISK], rates.get(PINNED, math.inf))
    network = network_of(plan)
    forward = network.linear(video.tokens) / rates[MATMUL] + network.attention(video.tokens) / rates[ATTENTION]
    sent = sent_bytes(plan.layout, network, video.tokens, plan.dtype.itemsize, sharded_bytes(plan))
    sending = sum(each * (passes if why == "weights" else forwards).total() for why, each in sent.items())
    computing = forward * forwards.total() / ranks + sending / rates.get(EXCHANGE, math.inf)
    denoise = max(computing, read / feed)
    # rows of the table are read, not multiplied
    table = plan.checkpoint.text_encoder.module.get_parameter("token_embedding.weight").numel()
    token = 2.0 * (plan.weight_bytes["text encoder"] / plan.text_dtype.itemsize - table)
    thinking = (1 + plan.uses_negative) * token * plan.config.text_len / rates[MATMUL]
    encode = partial(encode_operations, still=bool(plan.config.mask_channels))

    def coding(count: Callable[..., float], latent: Sequence[int], tiles: tuple[int, int]) -> float:
        """Seconds of the process that has most to do."""
        regions = [region.divided(*fitting(tiles, region)) for region in divide(latent[2], latent[3], ranks)]
        return max(count(vae, latent, tiled) for tiled in regions) / rates[VAE]

    return Seconds(
        text=max(thinking, token / feed),  # two bytes of a weight, two operations
        image=coding(encode, video.encoded, video.encode_tiles) if video.encoded else 0.0,
        denoise=denoise,
        decode=coding(decode_operations, video.latent, video.tiles),
        again=computing if budget is None or budget.resident else denoise,
        read=int(read),
    )


def steps_of(plan: Plan, video: VideoPlan) -> Sequence[Step]:
    """The plan's steps that this video takes, each once for every window."""
    return plan.steps[video.first_step :] * max(1, len(video.windows))


# -- counted work


@dataclass(frozen=True)
class NetworkSizes:
    """The sizes of a transformer that decide its cost."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int

    def operations(self, tokens: int) -> float:
        """Floating-point operations of one forward; a multiplication and an addition are two."""
        return self.linear(tokens) + self.attention(tokens)

    def linear(self, tokens: int) -> float:
        """Operations of the products with weights."""
        weights = 6 * self.dim**2 + 2 * self.dim * self.ffn_dim  # q, k, v, o; the text's q, o; feed-forward
        return self.num_layers * 2.0 * tokens * weights

    def attention(self, tokens: int) -> float:
        """Operations of the products of tokens with tokens."""
        return self.num_layers * 4.0 * tokens**2 * self.dim


def work_of(plan: Plan, job: Job) -> float:
    """Floating-point operations of the transformer in one video."""
    own, video = plan.of(job), plan.video(job)
    return network_of(own).operations(video.tokens) * sum(1 + step.guided for step in steps_of(own, video))


def network_of(plan: Plan) -> NetworkSizes:
    """The sizes of the plan's transformer."""
    ffn_dim, dim = plan.transformer.get_parameter("blocks.0.ffn.0.weight").shape
    return NetworkSizes(dim, ffn_dim, plan.transformer.num_heads, len(plan.transformer.blocks))


def sharded_bytes(plan: Plan) -> int:
    """Bytes of the largest expert, if it is sharded over processes, else 0."""
    experts = [plan.weight_bytes[f"{name} expert"] for name in plan.checkpoint.experts] if plan.request.dit_fsdp else []
    return max(experts, default=0)


def sent_bytes(
    layout: Layout, network: NetworkSizes, tokens: int, element_bytes: int, sharded_bytes: int = 0
) -> dict[str, float]:
    """Bytes that one rank sends in one forward, by purpose.
    sharded_bytes: size of the whole network if its weights are sharded over the sequence group."""
    ulysses, ring, ranks = layout.ulysses, layout.ring, layout.sequence
    share = -(-tokens // ranks) * network.dim * element_bytes  # one rank's part of a token tensor
    return {
        "ulysses": network.num_layers * 4 * share * (ulysses - 1) / ulysses,  # q, k, v there, the result back
        "ring": network.num_layers * 2 * share * (ring - 1),  # k and v to each of the others
        "weights": sharded_bytes / ranks * (ranks - 1),
    }


# Floating-point operations of autoencoders: products with weights and of attention, which is all but a hundredth.
# Regions and grids are of latent cells; of a region that is coded by itself its rim counts too.


def decode_operations(vae: WanVAE, latent: Sequence[int], regions: Sequence[vae_layers.Region] | None = None) -> float:
    """Decoding a `latent` [C, f, h, w]: the middle of whole frames, then each region (None: the frame is one)."""
    whole = vae_layers.Region(0, latent[2], 0, latent[3])
    total = _middle(vae.decoder, latent[1], whole.area, vae.conv2, vae.decoder.conv1)
    for region in regions or [whole]:
        frames, frame, area = latent[1], whole, 0
        for level, rim in zip(vae.decoder.levels, vae_layers.DECODER_RIM, strict=True):
            area = region.grown(rim, rim, frame).area
            for layer in level.layers:
                if not isinstance(layer, vae_layers.Upsample):
                    total += _products(frames * area, layer)
                    continue
                if layer.time_conv:
                    total += _products((frames - 1) * area, layer.time_conv)
                    frames = 2 * frames - 1
                total += DOUBLING * _products(frames * area, layer.resample)
                region, frame = region.scaled(2), frame.scaled(2)
        total += _products(frames * area, vae.decoder.head)
    return total


def encode_operations(
    vae: WanVAE, latent: Sequence[int], regions: Sequence[vae_layers.Region] | None = None, *, still: bool = True
) -> float:
    """Encoding a clip of this `latent` [C, f, h, w], `still` after a frame; regions as for `decode_operations`. The
    first frame's chunk, and those of four after it until a stage's output is constant (see `reuse_constant_tail`)."""
    encoder, scale = vae.encoder, vae.stride[1] // vae.patch
    frames, frame = latent[1], vae_layers.Region(0, latent[2], 0, latent[3])
    total = _middle(encoder, frames, frame.area, encoder.head, vae.conv1)
    layers: list[list[nn.Module]] = [[encoder.conv1], *(level.layers for level in encoder.levels)]
    for window in [region.grown(*vae_layers.ENCODER_RIM, frame) for region in regions or [frame]]:
        rows, columns = scale * (window.bottom - window.top), scale * (window.right - window.left)
        constant, length = 1 if still else 4 * frames - 3, 4  # length: of a chunk where the stage begins
        for stage, inside in zip(encoder.stages(vae_layers.ClipState(frame.area)), layers, strict=True):
            constant = stage.constant_after(constant)
            shorter = length // 2 if stage.halves_time else length  # where it ends
            running = min(frames - 1, 1 - (1 - constant) // shorter)
            for layer in inside:
                if not isinstance(layer, vae_layers.Downsample):
                    total += _products((1 + running * length) * rows * columns, layer)
                    continue
                rows, columns = rows // 2, columns // 2
                total += _products((1 + running * length) * (rows + 1) * (columns + 1), layer.resample)
                if layer.time_conv:
                    total += _products(running * shorter * rows * columns, layer.time_conv)
            length = shorter
    return total


def _middle(coder: vae_layers.Coder, frames: int, area: int, *beside: nn.Module) -> float:
    """The part with attention over the `area` of each frame, and the layers `beside` it."""
    attention = coder.middle[1]
    assert isinstance(attention, vae_layers.FrameAttention)
    return _products(frames * area, coder.middle, *beside) + 4.0 * frames * area**2 * attention.proj.out_channels


def _products(positions: int, *modules: nn.Module) -> float:
    """Convolutions at `positions`: one product with each weight."""
    found = (part for module in modules for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    return 2.0 * positions * sum(conv.weight.numel() for conv in found)


# -- measured rates


def keep_rates(device: torch.device, rates: Mapping[str, float]) -> None:
    """Keep what was measured for later plans. OSError or RuntimeError where there is no place for it."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    kept = _all_rates() | {_name_of(device): dict(rates)}
    write_file(cache_folder() / RATES_FILE, json.dumps(kept, indent=1))


def kept_rates(device: torch.device) -> dict[str, float] | None:
    """Rates measured on this device with this version of PyTorch; None unless all were."""
    found = _all_rates().get(_name_of(device))
    kept = found.items() if isinstance(found, dict) else ()
    rates = {name: rate for name, rate in kept if isinstance(rate, float) and rate > 0}
    return rates if rates.keys() >= set(NEEDED_RATES) else None


def _all_rates() -> dict[str, Any]:
    try:
        return dict(json.loads((cache_folder() / RATES_FILE).read_text("utf-8")))
    except (OSError, ValueError, RuntimeError, TypeError):  # no home, no file or a damaged one: time is unknown
        return {}


def _name_of(device: torch.device) -> str:
    """Folders may be shared by machines, so a CPU goes by its host's name, and by the threads in use."""
    threads = f"{device.type} of {platform.node()}, {torch.get_num_threads()} threads"
    name = Accelerator(device).name if Accelerator(device).has_memory else threads
    return f"{name}, torch {torch.__version__}"
