"""peft adapters give the merged model's results, and change their scale without a reload."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning.lora import Lora
from lightning.merge import Merge
from lightning.peft_adapter import add_adapters, set_scale
from tests.lightning.support import base, lora_of, merged, module_tree, small_pairs, spelled
from tests.support import lora_dir


def outputs(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The output of every linear layer for one input."""
    found = {}
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(3)).to(module.weight.dtype)
        found[name] = module(x)
    return found


def with_weights(loras: list[Lora]) -> nn.Module:
    model, changed = module_tree(base()), merged(loras)
    for name, parameter in model.named_parameters():
        if name in changed:
            parameter.data = changed[name]
    return model


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_adapters_equal_the_merge_at_every_scale(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    first = lora_dir("t2v-A14B") / "high_noise_model.safetensors"
    generator = torch.Generator().manual_seed(4)
    uneven = {
        module: (
            torch.randn(up.shape[0], rank, generator=generator),
            torch.randn(rank, down.shape[1], generator=generator),
        )
        for rank, (module, (up, down)) in enumerate(list(small_pairs().items())[:7], 2)
    }
    tensors = spelled(uneven, "diffusion_model.{}.", alpha=torch.tensor(3.0))
    second = lora_of(tmp_path, tensors | {"blocks.0.self_attn.q.diff_b": torch.ones(64)}, strength=0.3).path
    names = sorted(f"{module}.weight" for module in small_pairs())

    loras = [Lora.open(first, 0.8), Lora.open(second, 0.3)]
    model, differences = module_tree(base()), Merge(loras, base().shapes, linear_pairs=False)
    assert list(differences.deltas) == ["blocks.0.self_attn.q.bias"]
    for name, parameter in model.named_parameters():
        parameter.data = differences(name, parameter.data).clone()
    plain = outputs(model, names)
    add_adapters(model, loras)
    assert not [str(warning.message) for warning in recwarn], "peft warns of a second adapter"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_close(outputs(model, names), outputs(with_weights(loras), names))

    set_scale(model, 0.0, loras)
    assert all(torch.equal(found, plain[name]) for name, found in outputs(model, names).items())
    set_scale(model, 0.5, loras)
    halved = with_weights([Lora.open(first, 0.4), Lora.open(second, 0.15)])
    halved.get_parameter("blocks.0.self_attn.q.bias").data += 0.15  # the difference keeps its strength
    assert_close(outputs(model, names), outputs(halved, names))
    set_scale(model, 1.0, loras)
    assert_close(outputs(model, names), outputs(with_weights(loras), names))


def test_adapters_take_the_layers_dtype() -> None:
    model = module_tree(base()).to(torch.bfloat16)
    add_adapters(model, [Lora.open(lora_dir("t2v-A14B") / "high_noise_model.safetensors")])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 20


def test_adapters_are_there_while_the_layers_are_not() -> None:
    """Blocks that stream are on the meta device until they are used, and peft moves adapters to their layers."""
    lora = Lora.open(lora_dir("t2v-A14B") / "high_noise_model.safetensors")
    model = module_tree(base()).to("meta")
    add_adapters(model, [lora, lora], torch.device("cpu"))
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert adapters
    assert {parameter.device.type for parameter in adapters} == {"cpu"}
