"""Seconds to expect of a video: operations counted from the networks, and bytes of files, divided by measured rates.

`python -m wan.doctor` measures the rates and keeps them for the plans of this machine. What is between the products,
and writing the mp4, is not in the seconds.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from wan.distributed.cost import Network
from wan.loading.budget import Budget
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE
from wan.plan import Plan, latent_shape
from wan.utils.files import cache_folder, replacing

MATMUL, ATTENTION, VAE = "matmul", "attention", "VAE"  # floating-point operations a second
COPY, PINNED, PAGEABLE, DISK = "device copy", "host to device, pinned", "host to device, pageable", "disk read"  # bytes
NEEDED = (MATMUL, ATTENTION, VAE, DISK)
STORED = 4  # bytes of a weight in a released expert's file: float32


@dataclass(frozen=True)
class Seconds:
    """Of the stages of one video; a stage takes the longer of computing and reading what it needs.

    again: what `denoise` is in the videos after the first one, whose weights may be there. read: bytes of the experts.
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


def seconds(
    plan: Plan, budget: Budget | None, size: tuple[int, int], frames: int, rates: Mapping[str, float]
) -> Seconds:
    """Of a video of `size` (width, height). budget: how the device is shared; None: everything stays on it."""
    config, checkpoint = plan.config, plan.checkpoint
    assert checkpoint.text_encoder is not None, "a checkpoint with problems makes no plan"
    assert checkpoint.vae is not None, "a checkpoint with problems makes no plan"
    forwards = Counter(step.expert for step in plan.steps for _ in range(1 + step.guided))
    read = sum(_bytes_read(plan, budget, name, count) for name, count in forwards.items())
    feed = min(rates[DISK], rates.get(PINNED, float("inf")))
    tokens, network = plan.tokens(size, frames), network_of(plan)
    forward = network.linear(tokens) / rates[MATMUL] + network.attention(tokens) / rates[ATTENTION]
    computing = forward * forwards.total()
    encoder, vae = checkpoint.text_encoder[0], checkpoint.vae[0]
    text_bytes = 2 * sum(p.numel() for n, p in encoder.named_parameters() if n != "token_embedding.weight")
    thinking = plan.prompts() * text_operations(encoder, config.text_len) / rates[MATMUL]
    denoise = max(computing, read / feed)
    return Seconds(
        text=max(thinking, text_bytes / feed),
        image=encode_operations(vae, size, frames) / rates[VAE] if config.mask_channels else 0.0,
        denoise=denoise,
        decode=decode_operations(vae, latent_shape(config, size, frames)) / rates[VAE],
        again=computing if budget is None or budget.resident else denoise,
        read=read,
    )


def network_of(plan: Plan) -> Network:
    """The sizes of the plan's transformer."""
    model, _ = next(iter(plan.checkpoint.experts.values()))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    ffn_dim, dim = shapes["blocks.0.ffn.0.weight"]
    return Network(dim, ffn_dim, model.num_heads, len(model.blocks))


def _bytes_read(plan: Plan, budget: Budget | None, expert: str, forwards: int) -> int:
    """Of the expert's file in one video: what stays once, what passes through once a forward."""
    module, store = plan.checkpoint.experts[expert]
    if budget is None:
        return STORED * sum(parameter.numel() for parameter in module.parameters())
    sizes, stored = budget.experts[expert], float(STORED)
    if store is not None:  # of a released checkpoint that is not here there is none
        stored = sum(map(store.stored_bytes, store)) / sum(math.prod(entry.shape) for entry in store.values())
    stay = budget.staying(sizes)
    return int((stay + (sizes.units - stay) * forwards) * sizes.unit_bytes * stored / plan.dtype.itemsize)


def text_operations(encoder: UMT5Encoder, tokens: int) -> float:
    """One product with every weight but the table's; attention over so few tokens is left out."""
    weights = sum(p.numel() for name, p in encoder.named_parameters() if name != "token_embedding.weight")
    return 2.0 * weights * tokens


@cache
def decode_operations(vae: WanVAE, shape: tuple[int, int, int, int]) -> float:
    """Of one decode of a latent of this shape by a `vae` on the meta device.

    After the first latent frame all cost the same, so three are counted.
    """
    channels, length, rows, columns = shape

    def count(frames: int) -> int:
        return counted(lambda: list(vae.decode(torch.empty(channels, frames, rows, columns, device="meta"))))

    first, three = count(1), count(3)
    return first + (three - first) / 2 * (length - 1)


@cache
def encode_operations(vae: WanVAE, size: tuple[int, int], frames: int) -> float:
    """Of encoding a picture of `size` (width, height) as the start of a clip of 4n + 1 frames."""
    image = torch.empty(3, size[1], size[0], device="meta")
    return counted(lambda: vae.encode_first_frame(image, frames))


def counted(work: Callable[[], object]) -> int:
    """Floating-point operations of `work`, which runs on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        work()
    return counter.get_total_flops()


def keep_rates(device: torch.device, rates: Mapping[str, float]) -> None:
    """Keep what was measured for later plans. OSError or RuntimeError where there is no place for it."""
    kept = _all_kept() | {_name_of(device): dict(rates)}
    cache_folder().mkdir(parents=True, exist_ok=True)
    with replacing(_rates_file()) as part:
        part.write_text(json.dumps(kept, indent=1), "utf-8")


def kept_rates(device: torch.device) -> dict[str, float] | None:
    """What was measured on this device with this version of PyTorch, if everything was."""
    found = _all_kept().get(_name_of(device))
    whole = isinstance(found, dict) and all(isinstance(found.get(n), float) and found[n] > 0 for n in NEEDED)
    return found if whole else None


def _all_kept() -> dict[str, Any]:
    with suppress(OSError, ValueError, RuntimeError):
        kept = json.loads(_rates_file().read_text("utf-8"))
        if isinstance(kept, dict):
            return kept
    return {}


def _rates_file() -> Path:
    return cache_folder() / "rates.json"


def _name_of(device: torch.device) -> str:
    """Folders may be shared by machines, so a CPU goes by its host's name and the threads in use."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} of {platform.node()}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
