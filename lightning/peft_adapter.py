"""LoRAs kept apart from the weights, as peft adapters: their scale can change between two steps of one video.

    y = W x + b + scale * strength * (alpha / rank) * up (down x)

Only pairs on linear layers can be adapters; `Merge(..., linear_pairs=False)` merges the rest while loading.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning.lora import Lora


def add_adapters(model: nn.Module, loras: Sequence[Lora], device: torch.device | None = None) -> None:
    """Put the pairs of `loras` on a loaded model's linear layers, in each layer's dtype, on `device` or the layer's.
    Parameters are renamed by this (`q.weight` becomes `q.base_layer.weight`). LoraError for NaN or Inf."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layers: dict[str, Any] = dict(model.named_modules())
    for number, lora in enumerate(loras):
        deltas = [delta for delta in lora.deltas(shapes) if delta.is_adapter]
        if not deltas:
            continue
        name, modules = f"lora_{number}", {delta.target.removesuffix(".weight"): delta for delta in deltas}
        alphas = {module: delta.scale * delta.rank for module, delta in modules.items()}
        config = LoraConfig(
            r=deltas[0].rank, rank_pattern={module: delta.rank for module, delta in modules.items()},
            lora_alpha=next(iter(alphas.values())), alpha_pattern=alphas, target_modules=list(modules),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several LoRAs are meant
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
        # not by peft's loader, which moves adapters to where the layer's weight is: nowhere, when it streams
        for module, delta in modules.items():
            layer, adapted = layers[module], model.get_submodule(module)
            assert isinstance(adapted, LoraLayer)
            dtype = (layer.weight if layer.bias is None else layer.bias).dtype  # a weight may be in 8 bits
            for parts, tensor in zip((adapted.lora_B, adapted.lora_A), delta.tensors, strict=True):
                found = lora.read(tensor).flatten(1).to(device or layer.weight.device, dtype)
                parts[name].weight = nn.Parameter(found, requires_grad=False)
    set_scale(model, 1.0, loras)


def set_scale(model: nn.Module, scale: float, loras: Sequence[Lora]) -> None:
    """Scale all adapters by `scale` and the strengths of `loras`, those of `add_adapters`; at 0 they cost nothing."""
    strengths = {f"lora_{number}": lora.strength for number, lora in enumerate(loras)}
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name in module.scaling:
            module.set_scale(name, scale * strengths[name])
        active = [name for name, value in module.scaling.items() if value]
        if active:
            module.set_adapter(active)
        module.enable_adapters(bool(active))
    model.requires_grad_(False)  # peft makes active adapters trainable
