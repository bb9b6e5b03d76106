"""Seconds to expect of a video: operations counted from the networks, and bytes of files, divided by measured rates.

`python -m wan.doctor` measures the rates and keeps them for the plans of this machine. What is between the products,
and writing the mp4, is not in the seconds.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from wan.distributed.vae_parallel import divide, fitting
from wan.jobs.chains import chains
from wan.jobs.job import Job
from wan.offload.budget import Budget
from wan.planning.communication import NetworkSizes, sent_bytes
from wan.planning.flops import decode_operations, encode_operations, text_operations
from wan.planning.plan import Plan, VideoPlan, video_kind
from wan.utils.accelerator import Accelerator
from wan.utils.files import cache_folder, replacing

MATMUL, ATTENTION, VAE = "matmul", "attention", "VAE"  # floating-point operations a second
COPY, PINNED, PAGEABLE, DISK = "device copy", "host to device, pinned", "host to device, pageable", "disk read"  # bytes
EXCHANGE = "exchange"  # bytes that a process sends, while all of them do
NEEDED_RATES = (MATMUL, ATTENTION, VAE, DISK)
RATES_FILE = "rates.json"
STORED = 4  # bytes of a weight in a released expert's file: float32


@dataclass(frozen=True)
class Seconds:
    """Seconds of one video by stage, the longer of computing and reading; `read`: bytes of the experts' files.

    again: `denoise` in the videos after the first one, whose weights may be there already.
    """

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


@dataclass(frozen=True)
class Expected:
    """Seconds of a run: its longest video, and all of it. communication: whether time to send is included."""

    longest: Seconds
    whole: float
    communication: bool

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of the longest video, by the stages that it has."""
        return {n: spent for n in ("text", "image", "denoise", "decode") if (spent := getattr(self.longest, n))}


def expect(plan: Plan, todo: Sequence[Job]) -> Expected | None:
    """Seconds of a run that makes these jobs; None without rates or jobs."""
    rates = kept_rates(plan.device)
    if rates is None or not todo:
        return None
    found = {kind: seconds(plan, video, rates) for kind, video in plan.videos.items()}
    shares = (chains(todo)[group :: plan.layout.data] for group in range(plan.layout.data))
    spent = [[found[video_kind(job)] for chain in share for job in chain] for share in shares]
    wholes = [sum(one.next for one in made) + max(one.first - one.next for one in made) for made in spent if made]
    longest = max((one for made in spent for one in made), key=lambda one: one.first)
    return Expected(longest, max(wholes), plan.layout.sequence == 1 or EXCHANGE in rates)


def seconds(plan: Plan, video: VideoPlan, rates: Mapping[str, float]) -> Seconds:
    """Seconds of one video. Processes that make it together share tokens and frames evenly, and read the same files."""
    ranks, budget = plan.layout.sequence, video.budget
    # a block that streams, or is gathered from the other processes, comes once for both passes of a step
    batch_guidance = budget.batch_guidance if budget else plan.request.dit_fsdp
    forwards = Counter(step.expert for step in plan.steps for _ in range(1 + step.guided))
    passes = Counter(step.expert for step in plan.steps) if batch_guidance else forwards
    read = sum(_bytes_read(plan, budget, name, count) for name, count in passes.items())
    feed = min(rates[DISK], rates.get(PINNED, math.inf))
    network = network_of(plan)
    forward = network.linear(video.tokens) / rates[MATMUL] + network.attention(video.tokens) / rates[ATTENTION]
    sent = sent_bytes(plan.layout, network, video.tokens, plan.dtype.itemsize, sharded_bytes(plan))
    sending = sum(each * (passes if why == "weights" else forwards).total() for why, each in sent.items())
    computing = forward * forwards.total() / ranks + sending / rates.get(EXCHANGE, math.inf)
    encoder, vae = plan.checkpoint.text_encoder.module, plan.checkpoint.vae.module
    text_bytes = 2 * sum(p.numel() for n, p in encoder.named_parameters() if n != "token_embedding.weight")
    thinking = (1 + plan.guided) * text_operations(encoder, plan.config.text_len) / rates[MATMUL]
    denoise = max(computing, read / feed)

    def coding(count: Callable[..., float], latent: Sequence[int], tiles: tuple[int, int]) -> float:
        """Seconds of the process that has most to do."""
        regions = [region.divided(*fitting(tiles, region)) for region in divide(latent[2], latent[3], ranks)]
        return max(count(vae, latent, tiled) for tiled in regions) / rates[VAE]

    return Seconds(
        text=max(thinking, text_bytes / feed),
        image=coding(encode_operations, video.encoded, video.encode_tiles) if video.encoded else 0.0,
        denoise=denoise,
        decode=coding(decode_operations, video.latent, video.tiles),
        again=computing if budget is None or budget.resident else denoise,
        read=read,
    )


def sharded_bytes(plan: Plan) -> int:
    """Bytes of the largest expert, if it is sharded over processes, else 0."""
    experts = [plan.weight_bytes[f"{name} expert"] for name in plan.checkpoint.experts] if plan.request.dit_fsdp else []
    return max(experts, default=0)


def network_of(plan: Plan) -> NetworkSizes:
    """The sizes of the plan's transformer."""
    model = plan.transformer
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    ffn_dim, dim = shapes["blocks.0.ffn.0.weight"]
    return NetworkSizes(dim, ffn_dim, model.num_heads, len(model.blocks))


def _bytes_read(plan: Plan, budget: Budget | None, expert: str, forwards: int) -> int:
    """Bytes of the expert's file for one video: blocks that stay once, the others once in each forward."""
    part, stored = plan.checkpoint.experts[expert], float(STORED)
    numbers, store = sum(parameter.numel() for parameter in part.module.parameters()), part.weights
    if store:  # of a released checkpoint that is not here it is empty
        stored = sum(store.stored(name)[1] for name in store) / sum(math.prod(entry.shape) for entry in store.values())
    if budget is None or budget.resident:
        return int(stored * numbers)
    sizes = budget.experts[expert]
    stay = budget.staying(sizes)
    return int((stay + (sizes.blocks - stay) * forwards) * sizes.block_bytes * stored / plan.dtype.itemsize)


def keep_rates(device: torch.device, rates: Mapping[str, float]) -> None:
    """Keep what was measured for later plans. OSError or RuntimeError where there is no place for it."""
    kept = _all_rates() | {_name_of(device): dict(rates)}
    cache_folder().mkdir(parents=True, exist_ok=True)
    with replacing(cache_folder() / RATES_FILE) as part:
        part.write_text(json.dumps(kept, indent=1), "utf-8")


def kept_rates(device: torch.device) -> dict[str, float] | None:
    """What was measured on this device with this version of PyTorch, if everything was."""
    found = _all_rates().get(_name_of(device))
    kept = found.items() if isinstance(found, dict) else ()
    rates = {name: rate for name, rate in kept if isinstance(rate, float) and rate > 0}
    return rates if rates.keys() >= set(NEEDED_RATES) else None


def _all_rates() -> dict[str, Any]:
    with suppress(OSError, ValueError, RuntimeError):  # no home, no file or a damaged one: time is unknown
        kept = json.loads((cache_folder() / RATES_FILE).read_text("utf-8"))
        return kept if isinstance(kept, dict) else {}
    return {}


def _name_of(device: torch.device) -> str:
    """Folders may be shared by machines, so a CPU goes by its host's name, and by the threads in use."""
    threads = f"{device.type} of {platform.node()}, {torch.get_num_threads()} threads"
    name = Accelerator(device).name if Accelerator(device).has_memory else threads
    return f"{name}, torch {torch.__version__}"
