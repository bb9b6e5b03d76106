"""The scale of adapters that PEFT and diffusers really wrote, against what these libraries apply themselves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.lora import Lora, check, settings_of
from tests.lightning.support import base, merged, small_pairs, write
from wan.checkpoints.key_mapping import diffusers_name
from wan.utils.errors import LoraError

FILE = Path("pytorch_lora_weights.safetensors")
SETTINGS = [
    {"r": 8, "lora_alpha": 32},
    {"r": 8, "lora_alpha": 32, "use_rslora": True},
    {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2, "blocks.1.ffn.net.2": 6}},
    {"r": 4, "lora_alpha": 2, "alpha_pattern": {r"blocks\.0\.attn1\.to_[qk]": 12, "to_q": 7, "^blocks.1.*to_v": 3}},
    {"r": 4, "lora_alpha": 2, "use_rslora": True, "rank_pattern": {"to_q": 9}, "alpha_pattern": {"to_k": 5}},
]


def adapted(settings: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """diffusers' transformer of the small checkpoint's size with a random adapter; what peft adds to our weights."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(5)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=16, out_channels=16, ffn_dim=80, num_layers=2,
        text_dim=base()["text_embedding.0.weight"].shape[1],
    )  # fmt: skip
    model.add_adapter(
        LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"], **settings)
    )
    ours = {diffusers_name(name): name for name in base()}
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            expected[ours[f"{name}.weight"]] = module.get_delta_weight("default").detach()
    assert len(expected) == 20
    return model, expected


def assert_adds(lora: Lora, expected: dict[str, Tensor]) -> None:
    assert check(lora, base().shapes).pairs == (20, 20)
    found, store = merged(lora), base()
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name] - store.read(name), delta, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_saved_diffusers_model_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    model, expected = adapted(settings)
    model.save_lora_adapter(tmp_path)
    assert_adds(Lora.open(tmp_path / FILE), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_saved_diffusers_pipeline_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import WanPipeline
    from peft.utils import get_peft_model_state_dict

    model, expected = adapted(settings)
    layers, metadata = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    assert_adds(Lora.open(tmp_path / FILE), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_peft_adapter_given_as_folder_or_file(settings: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    plain = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(), "proj": torch.nn.Linear(1, 1)})
    for _ in range(2):
        layers = {name: torch.nn.Linear(64, 64) for name in ("to_q", "to_k", "to_v")}
        block = {"attn1": torch.nn.ModuleDict(layers | {"to_out": torch.nn.ModuleList([torch.nn.Linear(64, 64)])})}
        plain["blocks"].append(torch.nn.ModuleDict(block))
    known = {k: v for k, v in settings.items() if k != "rank_pattern"} | {"rank_pattern": {"to_q": 2}}
    model = get_peft_model(plain, LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **known))
    ours = {diffusers_name(name): name for name in base()}
    expected = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            expected[ours[f"{name}.weight"]] = module.get_delta_weight("default").detach()
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found, store = merged(Lora.open(path)), base()
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found[name] - store.read(name), delta, rtol=1e-5, atol=1e-4)
    other = shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "other.safetensors")
    assert Lora.open(Path(other)).settings is None


def metadata_of(**settings: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(settings)}


def test_the_component_that_is_read() -> None:
    both = metadata_of(**{"transformer.lora_alpha": 2, "transformer_2.lora_alpha": 3, "text_encoder.lora_alpha": 4})
    for expert, alpha in ((None, 2), ("high", 2), ("model", 2), ("low", 3)):
        settings = settings_of(FILE, both, expert)
        assert settings is not None
        assert settings("blocks.0.attn1.to_q", 1) == alpha
    with pytest.raises(LoraError, match=r"text_encoder.*unet.* not a transformer"):
        settings_of(FILE, metadata_of(**{"text_encoder.r": 1, "unet.r": 2}), None)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"lora_alpha": ' + "9" * 5000 + "}", '{"lora_alpha": 1e999}', '{"alpha_pattern": [1]}',
     '{"lora_alpha": {}}', '{"alpha_pattern": {"' + "(" * 5000 + '": 1}}', "null", "\0"],
)  # fmt: skip
def test_hostile_settings_are_one_sentence(text: str, tmp_path: Path) -> None:
    tensors = {f"transformer.{name}.lora_A.weight": down for name, (_, down) in small_pairs().items()}
    path = write(tmp_path / FILE, tensors, {"lora_adapter_metadata": text})
    with pytest.raises(LoraError) as caught:
        Lora.open(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(path))
