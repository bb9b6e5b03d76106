"""The error names the file at fault and says what it really is."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning.__main__ import main
from tests.checkpoints.gguf_support import write_gguf
from tests.checkpoints.support import problems
from tests.checkpoints.test_files import expert, saved
from tests.support import checkpoint, config_of
from wan.checkpoints.checkpoint import open_checkpoint
from wan.checkpoints.key_mapping import text_name
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import EXPERT, TEXT_ENCODER, VAE, as_ours, open_expert, open_file
from wan.utils.errors import InputError

TASK, HIGH = "t2v-A14B", "high_noise_model"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n"
PLACES = [
    "high_noise_model/diffusion_pytorch_model.safetensors.index.json",
    "high_noise_model/diffusion_pytorch_model-00001-of-00003.safetensors",
    "low_noise_model/config.json", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(checkpoint(TASK), tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.mark.parametrize("place", PLACES)
def test_a_pointer_or_web_page_in_place_of_a_file_is_named(place: str, folder: Path) -> None:
    for content, sign in (
        (LFS, "Git LFS pointer"),
        ("\n<!DOCTYPE html><html><title>Sign in", "HTML page"),
        ("../../blobs/0a1b2c", ""),
    ):
        (folder / place).write_text(content)
        (text,) = problems(folder)
        assert text.startswith(f"{folder / place}: ")
        assert sign in text


@pytest.mark.parametrize("place", PLACES)
def test_half_a_download_is_refused(place: str, folder: Path) -> None:
    """Zeros of the full size ran to the end."""
    (folder / f"{place}.aria2").touch()
    assert any(f"{Path(place).name}.aria2" in text for text in problems(folder))


def test_a_folder_one_level_off_gets_the_right_one_suggested(folder: Path) -> None:
    for wrong in (folder.parent, folder / "high_noise_model"):
        (text,) = problems(wrong)
        assert f"but {folder} has them all" in text


def test_the_hubs_cache_folder_leads_to_its_snapshot(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "models--Wan-AI--Wan2.2-T2V-A14B"
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    for wrong in (cache, cache / "snapshots"):
        (text,) = problems(wrong)
        assert f"but {snapshot} has them all" in text


def test_equal_experts_give_a_warning(folder: Path) -> None:
    assert not open_checkpoint(folder, config_of(TASK)).warnings
    shutil.copytree(folder / "high_noise_model", folder / "low_noise_model", dirs_exist_ok=True)
    (text,) = open_checkpoint(folder, config_of(TASK)).warnings
    assert "the same weights" in text


def test_an_expert_of_another_task_is_named(tmp_path: Path) -> None:
    source = TensorStore.open(checkpoint("i2v-A14B") / PLACES[0])
    file = saved({name: source.read(name) for name in source}, tmp_path / "x.safetensors")
    (text,) = problems(checkpoint(TASK), TASK, {"high": file})
    assert text.startswith(f"{file} has 36 input channels: it belongs to i2v-A14B")


def test_an_expert_of_another_size_is_to_blame_not_the_folder(tmp_path: Path) -> None:
    tensors = expert(HIGH) | {
        "blocks.0.ffn.0.weight": torch.zeros(96, 64),
        "blocks.0.ffn.2.weight": torch.zeros(64, 96),
    }
    file = write_gguf(tmp_path / "small.gguf", tensors)
    (text,) = problems(checkpoint(TASK), TASK, {"low": file})
    assert text.startswith(f"{file}: ")
    assert "ffn_dim" in text


def test_both_experts_from_one_file_is_a_warning(tmp_path: Path) -> None:
    file = saved(expert(HIGH), tmp_path / "x.safetensors")
    opened = open_checkpoint(checkpoint(TASK), config_of(TASK), {"high": file, "low": file})
    assert any(str(file) in warning and "high and low" in warning for warning in opened.warnings)
    assert open_checkpoint(checkpoint(TASK), config_of(TASK), {"high": file}).warnings == ()


def test_a_checkpoint_in_one_file_gives_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae, text = (torch.load(checkpoint(TASK) / name) for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"))
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in expert(HIGH).items()}
    tensors |= {f"vae.{name}": tensor for name, tensor in vae.items()}
    tensors |= {f"text_encoders.umt5xxl.transformer.{text_name(name)}": tensor for name, tensor in text.items()}
    tensors["text_encoders.umt5xxl.spiece_model"] = torch.zeros(9, dtype=torch.uint8)
    file = saved(tensors, tmp_path / "all.safetensors")
    for kind, expected in ((EXPERT, expert(HIGH)), (VAE, vae), (TEXT_ENCODER, text)):
        store = as_ours(open_file(file), kind, "all")
        assert store.keys() == expected.keys()
        assert all(torch.equal(store.read(name), tensor) for name, tensor in expected.items())
    all_three = {"high": file, "vae": file, "text_encoder": file}
    assert open_checkpoint(checkpoint(TASK), config_of(TASK), all_three).warnings == ()
    (left_out,) = open_checkpoint(checkpoint(TASK), config_of(TASK), {"vae": file}).warnings
    assert str(file) in left_out
    assert "expert and text_encoder is left out" in left_out
    assert main(["inspect", str(file), "--ckpt_dir", str(checkpoint(TASK))]) == 0
    use = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  use "))
    assert all(f"--{flag}" in use for flag in ("expert high=", "expert low=", "vae", "text_encoder"))


def test_embedding_of_a_text_encoder_without_its_other_name(tmp_path: Path) -> None:
    text = torch.load(checkpoint(TASK) / "models_t5_umt5-xxl-enc-bf16.pth")
    tensors = {text_name(name): tensor for name, tensor in text.items()}
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    store = as_ours(open_file(saved(tensors, tmp_path / "t5.safetensors")), TEXT_ENCODER, "t5")
    assert torch.equal(store.read("token_embedding.weight"), text["token_embedding.weight"])


@pytest.mark.parametrize("shape", [(-1, 1, 2, 2), (64, -1), (64, 16, 2, 2)])
def test_a_patch_embedding_of_fewer_axes_is_restored(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = expert(HIGH)
    flat = {**tensors, "patch_embedding.weight": tensors["patch_embedding.weight"].reshape(shape)}
    store = open_expert(write_gguf(tmp_path / "x.GGUF", flat))
    assert torch.equal(store.read("patch_embedding.weight"), tensors["patch_embedding.weight"])
    assert torch.equal(store.read("patch_embedding.weight", slice(3, 9)), tensors["patch_embedding.weight"][3:9])


def test_float64_experts_are_read(tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in expert(HIGH).items()}
    store = open_expert(saved(tensors, tmp_path / "x.safetensors"))
    assert {entry.dtype for entry in store.values()} == {"F32"}
    assert torch.equal(store.read("head.head.weight"), tensors["head.head.weight"].float())


def test_numbers_and_axes_of_a_header_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for shape in ([1] * 100_000, [10**300], [1 << 63] * 8, [True]):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(InputError, match="corrupt"):
            TensorStore.open(file)
    save_file({"n" * 300: torch.zeros(2)}, file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError) as caught:
        TensorStore.open(file)
    assert len(str(caught.value)) < 300 + len(str(file))


def test_single_numbers_in_eight_bits(tmp_path: Path) -> None:
    values = {
        "F8_E4M3": torch.tensor(-1.75).to(torch.float8_e4m3fn),
        "subnormal": torch.tensor(2.0**-9).to(torch.float8_e4m3fn),
        "F8_E5M2": torch.tensor(24.0).to(torch.float8_e5m2),
        "U8": torch.tensor(200, dtype=torch.uint8),
    }
    save_file(values, tmp_path / "x.safetensors")
    found = TensorStore.open(tmp_path / "x.safetensors").scalars(values)
    assert found == {name: float(value.float()) for name, value in load_file(tmp_path / "x.safetensors").items()}


def test_an_expert_for_sparse_attention_is_refused(tmp_path: Path) -> None:
    tensors = expert(HIGH) | {"blocks.0.self_attn.proj_l.weight": torch.zeros(2, 2)}
    with pytest.raises(InputError, match="sparse"):
        open_expert(saved(tensors, tmp_path / "x.safetensors"))
