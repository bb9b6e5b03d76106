"""Single files as other front ends publish them, instead of a checkpoint's parts or without any folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import generate
from tests.checkpoints.support import problems
from tests.support import checkpoint, config_of
from wan.checkpoints.checkpoint import open_checkpoint
from wan.checkpoints.key_mapping import text_name
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import TEXT_ENCODER, VAE, as_ours, open_file, open_parts
from wan.configs import TASKS

TASK = "t2v-A14B"
SOURCE = checkpoint(TASK)
VAE_FILE, T5_FILE = SOURCE / "Wan2.1_VAE.pth", SOURCE / "models_t5_umt5-xxl-enc-bf16.pth"


def expert(where: str, folder: Path = SOURCE) -> dict[str, Tensor]:
    config = TASKS[TASK]
    name = next(name for name, place in config.experts.items() if place == where)
    store = open_parts(folder, config, [name])[name]
    return {name: store.read(name).contiguous() for name in store}


def saved(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def comfy_files(folder: Path) -> list[str]:
    """The small checkpoint as ComfyUI's single files."""
    flags = []
    for name, where in (("high", "high_noise_model"), ("low", "low_noise_model")):
        named = {f"model.diffusion_model.{key}": tensor for key, tensor in expert(where).items()}
        flags += ["--expert", f"{name}={saved(named, folder / f'wan2.2_t2v_{name}.safetensors')}"]
    vae = {f"model.{key}": tensor for key, tensor in torch.load(VAE_FILE).items()}
    text = {text_name(key): tensor for key, tensor in torch.load(T5_FILE).items()}
    text["spiece_model"] = torch.zeros(9, dtype=torch.uint8)
    flags += ["--vae", str(saved(vae, folder / "wan_2.1_vae.safetensors"))]
    return [*flags, "--text_encoder", str(saved(text, folder / "umt5_xxl_fp16.safetensors"))]


def made(out: Path, *flags: str) -> Tensor:
    command = ["--task", TASK, "--prompt", "a cat", "--size", "64*64", "--frame_num", "5", "--base_seed", "3",
               "--sample_steps", "2", "--device", "cpu", "--save_latents", "--save_dir", str(out), *flags]  # fmt: skip
    assert generate.main(command) == 0
    return TensorStore.open(next(out.glob("*.latents.safetensors"))).read("latent")


def test_single_files_make_the_folders_latents(tmp_path: Path) -> None:
    files = comfy_files(tmp_path)
    expected = made(tmp_path / "a", "--ckpt_dir", str(SOURCE))
    assert torch.equal(made(tmp_path / "b", "--ckpt_dir", str(SOURCE), *files), expected)


def test_scaled_fp8_text_encoders_decode_to_their_weights(tmp_path: Path) -> None:
    tensors, exact = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, {}
    for name, tensor in torch.load(T5_FILE).items():
        tensors[text_name(name)], exact[name] = tensor, tensor
        if ".attn." in name:
            scale = tensor.float().abs().max() / 448
            q = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[text_name(name)], exact[name] = q, q.float() * scale
            tensors[text_name(name).replace(".weight", ".scale_weight")] = scale
    store = as_ours(open_file(saved(tensors, tmp_path / "t5.safetensors")), TEXT_ENCODER, "t5")
    assert store.keys() == exact.keys()
    assert all(torch.equal(store.read(name), tensor) for name, tensor in exact.items())


def test_files_alone_tell_their_sizes(tmp_path: Path) -> None:
    wide = {}
    for key, tensor in expert("high_noise_model").items():
        # twice as wide as the small one: heads of 128 as all published models have them
        wide[key] = torch.zeros([128 if n == 64 and key != "head.head.weight" else 6 * 128 if n == 384 else n
                                 for n in tensor.shape])  # fmt: skip
    wide["head.head.weight"], wide["head.head.bias"] = torch.zeros(64, 128), torch.zeros(64)
    text_width = torch.load(T5_FILE)["token_embedding.weight"].shape[1]
    wide["text_embedding.0.weight"] = torch.zeros(128, text_width)
    file = saved(wide, tmp_path / "wide.safetensors")
    files = {"high": file, "low": file, "vae": VAE_FILE, "text_encoder": T5_FILE,
             "tokenizer": SOURCE / "google" / "umt5-xxl" / "tokenizer.json"}  # fmt: skip
    model = open_checkpoint(None, config_of(TASK), files).experts["high"].module
    assert (model.num_heads, model.head_width) == (1, 128)
    narrow = saved(expert("high_noise_model"), tmp_path / "narrow.safetensors")
    (text,) = problems(None, TASK, {**files, "high": narrow})
    assert "do not tell their heads, and a width of 64 is no multiple of 128" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vae", "absent"], "--vae absent: no such file"),
        (["--tokenizer", "."], "--tokenizer .: no such folder with a tokenizer.json"),
        (["--vae", str(T5_FILE)], "not a Wan video autoencoder"),
        (["--text_encoder", str(VAE_FILE)], "not a UMT5 encoder"),
    ],
)
def test_a_wrong_file_is_one_line(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--ckpt_dir", str(SOURCE), "--prompt", "a cat", "--size", "64*64", "--dry_run", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line


def test_without_a_folder_every_part_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--vae", str(VAE_FILE), "--prompt", "a cat", "--dry_run"]) == 2
    text = capsys.readouterr().err
    assert "or give --expert high=FILE, --expert low=FILE, --text_encoder, --tokenizer too" in text


def test_vae_names_behind_a_prefix(tmp_path: Path) -> None:
    state = torch.load(VAE_FILE)
    file = saved({f"model.{key}": tensor for key, tensor in state.items()}, tmp_path / "v.safetensors")
    assert as_ours(open_file(file), VAE, "v").keys() == state.keys()
