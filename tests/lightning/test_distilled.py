"""Full experts in one file: prefixes, dtypes and quantised forms read as the base's tensors, the rest is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning.releases import refuse_distilled_twice
from tests.lightning.support import base, write
from tests.support import lora_dir
from wan.checkpoints.weights import open_expert
from wan.utils.errors import LoraError, TensorFileError

Q = "blocks.0.self_attn.q"


def weights() -> dict[str, Tensor]:
    store = base()
    return {name: store.read(name) for name in store}


def quantised(dtype: torch.dtype, by_row: bool, scale_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of a quantised file, the weights that they encode): all linear weights of the blocks."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    stored, exact = weights(), weights()
    for name, weight in weights().items():
        if not name.startswith("blocks.") or weight.dim() != 2:
            continue
        scale = weight.abs().amax(1, keepdim=True) / largest if by_row else weight.abs().max() / largest
        q = (weight / scale).round().to(dtype) if dtype == torch.int8 else (weight / scale).to(dtype)
        stored[name], stored[name.replace(".weight", scale_name)] = q, scale
        exact[name] = q.float() * scale
    return stored, exact


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_experts(prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in weights().items()}
    store = open_expert(write(tmp_path / "expert.safetensors", tensors))
    assert store.shapes == base().shapes
    assert all(torch.equal(store.read(name), tensors[f"{prefix}{name}"]) for name in store)


@pytest.mark.parametrize(
    ("dtype", "by_row", "scale_name"),
    [
        (torch.float8_e4m3fn, False, ".scale_weight"),
        (torch.float8_e5m2, False, ".scale_weight"),
        (torch.float8_e4m3fn, True, ".weight_scale"),
        (torch.int8, True, ".weight_scale"),
        (torch.int8, False, ".weight_scale"),
    ],
)
def test_quantised_experts(dtype: torch.dtype, by_row: bool, scale_name: str, tmp_path: Path) -> None:
    tensors, exact = quantised(dtype, by_row, scale_name)
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    tensors[f"{Q}.scale_input"] = torch.tensor(3.0)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    store = open_expert(write(tmp_path / "expert.safetensors", prefixed))
    assert store.shapes == base().shapes
    assert {entry.dtype for entry in store.values()} == {"F32"}
    rows = slice(5, 21)
    for name, expected in exact.items():
        buffer = torch.empty(store[name].bytes, dtype=torch.uint8)
        found = store.read(name, buffer=buffer)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert found.data_ptr() == buffer.data_ptr()
        assert torch.equal(store.read(name, rows), expected[rows])


def test_unscaled_fp8_is_what_it_says(tmp_path: Path) -> None:
    tensors = weights() | {f"{Q}.weight": weights()[f"{Q}.weight"].to(torch.float8_e4m3fn)}
    store = open_expert(write(tmp_path / "expert.safetensors", tensors))
    assert torch.equal(store.read(f"{Q}.weight"), tensors[f"{Q}.weight"].float())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{Q}.weight": torch.zeros(64, 32, dtype=torch.uint8)}, "q.weight .*U8"),
        ({f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8)}, "q.weight .*without a scale"),
        ({f"{Q}.weight_scale": torch.ones(64, 1)}, "q.weight .*F32 with a scale"),
        (
            {f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8), f"{Q}.weight_scale": torch.ones(64, 2)},
            r"q.weight .*\[64, 2\] F32",
        ),
        ({"blocks.7.ffn.0.weight_scale": torch.ones(1)}, "blocks.7.ffn.0.weight .*missing"),
        ({f"{Q}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "q.comfy_quant"),
    ],
)
def test_other_quantised_forms_are_refused(changes: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path / "expert.safetensors", weights() | changes)
    with pytest.raises(LoraError, match=sentence):
        open_expert(path)


@pytest.mark.parametrize(
    "changes",
    [
        {f"diffusion_model.{Q}.weight": torch.zeros(64, 64)},
        {f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int8)}
        | {f"{Q}{name}": torch.ones(1) for name in (".weight_scale", ".scale_weight")},
    ],
)
def test_one_tensor_in_two_spellings_is_refused(changes: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "expert.safetensors", weights() | changes)
    with pytest.raises(LoraError, match=r"self_attn\.q\.\S+ .*another spelling"):
        open_expert(path)


def test_files_that_are_no_expert_are_refused(tmp_path: Path) -> None:
    lora = lora_dir("t2v-A14B") / "high_noise_model.safetensors"
    with pytest.raises(LoraError, match=r"not a full expert, .* is missing \(a LoRA goes to --lora\)"):
        open_expert(lora)
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:99])
    with pytest.raises(TensorFileError, match="cut off"):
        open_expert(tmp_path / "cut.safetensors")


def test_distilling_twice(tmp_path: Path) -> None:
    expert = write(tmp_path / "wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors", weights())
    lora = tmp_path / "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1" / "high_noise_model.safetensors"
    write(lora, load_file(lora_dir("i2v-A14B") / "high_noise_model.safetensors"))
    with pytest.raises(LoraError, match=r"is distilled already \(i2v-distill-model\)"):
        refuse_distilled_twice(expert, lora)
    refuse_distilled_twice(expert, tmp_path / "style.safetensors")
    refuse_distilled_twice(write(tmp_path / "tuned.safetensors", weights()), lora)
