"""The released networks on the meta device: their shapes without their files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from wan.configs import TASKS
from wan.configs.task import TEXT_WIDTH
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE

UMT5_XXL = {"vocab": 256384, "dim": TEXT_WIDTH, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24}
VAES = {16: (16, 96, 96, False), 48: (48, 160, 256, True)}  # latent channels -> the arguments of WanVAE

Module = TypeVar("Module", bound=nn.Module)


def on_meta(build: Callable[[], Module]) -> Module:
    with torch.device("meta"):
        return build()


def released_transformer(task: str) -> WanModel:
    return on_meta(lambda: WanModel.from_config(vars(TASKS[task]), text_dim=TASKS[task].text_dim))


def released_shapes(task: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of one released expert of `task`, in the order of the network."""
    return {name: tuple(parameter.shape) for name, parameter in released_transformer(task).named_parameters()}


def released_text_encoder() -> UMT5Encoder:
    return on_meta(lambda: UMT5Encoder(**UMT5_XXL))


def released_vae(task: str) -> WanVAE:
    return on_meta(lambda: WanVAE(*VAES[TASKS[task].out_dim]))
