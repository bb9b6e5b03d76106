"""How a step sets the experts up, and which weights leave the device when; streaming is in `test_streaming.py`."""

import pytest
import torch
from torch import nn

import wan
from tests.support import checkpoint, config_of
from wan.offload.networks import Experts


def test_a_changed_lora_scale_reaches_the_network_once() -> None:
    changes: list[float] = []
    both = Experts({"high": nn.Linear(1, 1)}, None, lambda _, scale: changes.append(scale))  # type: ignore[dict-item]
    for scale in (1.0, 0.0, 0.0, 1.0):
        both.ready("high", scale)
    assert changes == [0.0, 1.0]


def test_each_expert_has_a_lora_scale_of_its_own() -> None:
    changes: list[tuple[str, float]] = []
    names = {"high": nn.Linear(1, 1), "low": nn.Linear(1, 1)}
    both = Experts(names, None, lambda name, scale: changes.append((name, scale)))  # type: ignore[arg-type]
    for name in ("high", "low", "high", "low"):
        both.ready(name, 0.5)
    assert changes == [("high", 0.5), ("low", 0.5)]


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_experts_leave_before_the_decode(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    task = wan.WanT2V(config_of("t2v-A14B"), checkpoint("t2v-A14B"), device=torch.device("cpu"))
    decode = task.decode
    monkeypatch.setattr(task.load_experts(), "leave", lambda _: order.append("leave"))
    monkeypatch.setattr(task, "decode", lambda latent, **how: order.append("decode") or decode(latent, **how))
    task.generate("a cat", (64, 48), 5, sample_solver="euler", sampling_steps=1, guide_scale=1.0, offload_model=offload)
    assert order == (["leave"] if offload else []) + ["decode"]
