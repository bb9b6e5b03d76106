"""What sits on the compute device when.

Weights never change after loading, so nothing is ever copied back: a network that leaves the device lets go of its
copy there and points to the one that stayed in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from wan.modules.model import WanModel


class Experts:
    """The denoising networks by name, brought to the device when a step needs them.

    models: loaded either on `device` (then they stay there) or in host memory. `offload`: at most one on the device.
    """

    def __init__(
        self,
        models: Mapping[str, WanModel],
        device: torch.device,
        set_lora: Callable[[WanModel, float], None] | None = None,
    ) -> None:
        """set_lora: changes the scale of a model's LoRA adapters; None if they are merged into the weights."""
        self.models, self.device, self.offload = dict(models), device, True
        self._set_lora = set_lora
        self._lora_scale = dict.fromkeys(models, 1.0)
        self._host: dict[str, dict[str, Tensor]] = {}  # host copies of the networks that are on the device now

    def ready(self, name: str, lora: float) -> WanModel:
        """The network on the device, its LoRAs at scale `lora`."""
        model = self.models[name]
        if name not in self._host and next(model.parameters()).device.type != self.device.type:
            if self.offload:
                for other in list(self._host):
                    self._leave(other)
            self._host[name] = to_device(model, self.device)
        if lora != self._lora_scale[name]:
            assert self._set_lora is not None, "a LoRA merged into the weights has one strength"
            self._set_lora(model, lora)
            self._lora_scale[name] = lora
        return model

    def leave(self) -> None:
        """Free the device of every network that has a copy in host memory."""
        for name in list(self._host):
            self._leave(name)

    def _leave(self, name: str) -> None:
        self.models[name].load_state_dict(self._host.pop(name), assign=True)


def to_device(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Give the model copies of its parameters on `device`; returns those it had."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    copies = {name: parameter.to(device, non_blocking=True) for name, parameter in before.items()}
    model.load_state_dict(copies, assign=True)
    return before
