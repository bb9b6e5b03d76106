"""What sits on the device when. The meta device stands for the accelerator: copies to it are counted, not made."""

import pytest
import torch
from torch import nn

import wan
from tests.support import checkpoint, config_of
from wan.loading.residency import Experts


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


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_experts_leave_before_the_decode(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    task = wan.WanT2V(config_of("t2v-A14B"), checkpoint("t2v-A14B"), device=torch.device("cpu"))
    decode = task.decode
    monkeypatch.setattr(task.load_experts(), "leave", lambda: order.append("leave"))
    monkeypatch.setattr(task, "decode", lambda latent: order.append("decode") or decode(latent))
    task.generate("a cat", (64, 48), 5, sample_solver="euler", sampling_steps=1, guide_scale=1.0, offload_model=offload)
    assert order == (["leave"] if offload else []) + ["decode"]
