"""The released networks without their files, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from lightning.names import NETWORKS, TEXT_WIDTH, TIME_WIDTH
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE

HEAD_WIDTH = 128
UMT5_XXL = {"vocab": 256384, "dim": TEXT_WIDTH, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24}
VAES = {"2.1": (16, 96, 96, False), "2.2": (48, 160, 256, True)}  # the arguments of WanVAE

Module = TypeVar("Module", bound=nn.Module)


def on_meta(build: Callable[[], Module]) -> Module:
    with torch.device("meta"):
        return build()


def transformer_sizes(task: str) -> dict[str, Any]:
    """What the released `config.json` says."""
    dim, ffn, blocks, channels_in, channels_out = NETWORKS[task]
    return {
        "dim": dim, "ffn_dim": ffn, "in_dim": channels_in, "out_dim": channels_out, "num_heads": dim // HEAD_WIDTH,
        "num_layers": blocks, "freq_dim": TIME_WIDTH, "text_len": WAN_CONFIGS[task].text_len, "eps": 1e-6,
    }  # fmt: skip


def released_transformer(task: str) -> WanModel:
    return on_meta(lambda: WanModel.from_config(transformer_sizes(task), text_dim=TEXT_WIDTH))


def released_text_encoder() -> UMT5Encoder:
    return on_meta(lambda: UMT5Encoder(**UMT5_XXL))


def released_vae(task: str) -> WanVAE:
    return on_meta(lambda: WanVAE(*VAES[vae_kind(task)]))


def vae_kind(task: str) -> str:
    return "2.1" if "2.1" in WAN_CONFIGS[task].vae_checkpoint else "2.2"
