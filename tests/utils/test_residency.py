"""What sits on the device when. The meta device stands for the accelerator: copies to it are counted, not made."""

import torch
from torch import nn

from wan.utils.residency import Experts


def experts(offload: bool) -> Experts:
    found = Experts({"high": nn.Linear(4, 4), "low": nn.Linear(4, 4)}, torch.device("meta"))  # type: ignore[dict-item]
    found.offload = offload
    return found


def placed(experts: Experts) -> list[str]:
    return [name for name, model in experts.models.items() if model.weight.device.type == "meta"]


def test_offload_keeps_one_network_on_the_device() -> None:
    both = experts(offload=True)
    address = both.models["high"].weight.data_ptr()
    both.ready("high", 1.0)
    assert placed(both) == ["high"]
    both.ready("low", 1.0)
    assert placed(both) == ["low"]
    assert both.models["high"].weight.data_ptr() == address, "it points at the tensor that never left: no copy back"
    both.leave()
    assert placed(both) == []


def test_without_offload_networks_stay() -> None:
    both = experts(offload=False)
    both.ready("high", 1.0)
    both.ready("low", 1.0)
    assert placed(both) == ["high", "low"]


def test_a_changed_lora_scale_reaches_the_network_once() -> None:
    changes: list[float] = []
    both = Experts({"high": nn.Linear(1, 1)}, torch.device("cpu"), lambda _, scale: changes.append(scale))  # type: ignore[dict-item]
    for scale in (1.0, 0.0, 0.0, 1.0):
        both.ready("high", scale)
    assert changes == [0.0, 1.0]
