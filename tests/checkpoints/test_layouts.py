"""One checkpoint in several forms makes the same latents bit for bit: as released, in diffusers' layout, as files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import generate
from lightning.__main__ import main
from tests.checkpoints.support import problems
from tests.support import TINY, checkpoint, config_of, lora_dir
from tests.test_golden import CLASSES
from wan.checkpoints.checkpoint import open_checkpoint
from wan.configs import TASKS
from wan.jobs.job import Sampling
from wan.sampling import Video

CPU = torch.device("cpu")


def bake(task: str, out: Path, *more: str) -> Path:
    arguments = ["--task", task, "--ckpt_dir", str(checkpoint(task)), "--out", str(out), "--layout", "diffusers"]
    assert main(["bake", *arguments, *more]) == 0
    return out


def latents(task: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    """Latent of one short video: [C, f, h, w]."""
    made = CLASSES[task](config_of(task, dtype), folder, device=CPU, **more)
    image = Image.open(TINY / "input.png").convert("RGB").resize((64, 64)) if task != "t2v-A14B" else None
    video = Video("a cat, “quoted”", "", (64, 64), 5, 7, image)
    return made.sample_with(Sampling("euler", 2, 5.0, (1.0, 1.0)), video)


@pytest.mark.parametrize("task", TASKS)
def test_diffusers_layout_makes_the_same_latents(task: str, tmp_path: Path) -> None:
    folder = bake(task, tmp_path / "out", "--dtype", "fp32")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(latents(task, folder, dtype), latents(task, checkpoint(task), dtype))
    lora = {"lora_dir": lora_dir(task)}
    assert torch.equal(latents(task, folder, **lora), latents(task, checkpoint(task), **lora))
    assert not torch.equal(latents(task, folder, **lora), latents(task, folder))


def test_a_folder_baked_in_bf16_makes_the_latents_of_a_bf16_run(tmp_path: Path) -> None:
    folder, lora = bake("t2v-A14B", tmp_path / "out", "--lora_dir", str(lora_dir("t2v-A14B"))), lora_dir("t2v-A14B")
    expected = latents("t2v-A14B", checkpoint("t2v-A14B"), torch.bfloat16, lora_dir=lora)
    assert torch.equal(latents("t2v-A14B", folder, torch.bfloat16), expected)


def test_the_high_noise_expert_is_the_one_that_diffusers_calls_transformer(tmp_path: Path) -> None:
    folder = bake("t2v-A14B", tmp_path / "out")
    opened = open_checkpoint(folder, config_of("t2v-A14B"))
    assert {name: part.weights.files[0].parent.name for name, part in opened.experts.items()} == {
        "high": "transformer",
        "low": "transformer_2",
    }


def generated(folder: Path, out: Path, *more: str) -> int:
    return generate.main(
        ["--task", "t2v-A14B", "--ckpt_dir", str(folder), "--prompt", "a cat", "--size", "64*64", "--frame_num", "5",
         "--base_seed", "3", "--sample_steps", "2", "--save_dir", str(out), *more]
    )  # fmt: skip


def test_resume_knows_the_folder_by_its_contents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = bake("t2v-A14B", tmp_path / "one"), tmp_path / "videos"
    assert generated(folder, out) == 0
    (video,) = out.glob("*.mp4")
    made = video.stat().st_mtime_ns
    moved = folder.rename(tmp_path / "two")
    assert generated(moved, out, "--resume") == 0
    assert [file.stat().st_mtime_ns for file in out.glob("*.mp4")] == [made]
    file = next((moved / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    capsys.readouterr()
    assert generated(moved, out, "--resume") == 2
    assert "ckpt_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "content", "sentence"),
    [
        ("transformer/config.json", "{}", "not the configuration of a Wan transformer"),
        ("transformer/config.json", {"num_attention_heads": 3}, "dim is 48, but the weights have 64"),
        ("transformer_2/config.json", {"attention_head_dim": [9] * 9}, "dim is None"),
        ("transformer_2/config.json", {"in_channels": 36}, "in_dim is 36, but the weights have 16"),
        ("transformer_2/config.json", {"num_layers": 10**9}, "num_layers is 1000000000, but the weights have 2"),
        ("text_encoder/model.safetensors.index.json", "{", "not a safetensors index"),
        ("tokenizer/tokenizer.json", "{}", "not a tokenizer"),
    ],
)
def test_a_wrong_file_is_one_line(
    place: str, content: str | dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bake("t2v-A14B", tmp_path / "out")
    file = folder / place
    text = content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content)
    file.write_text(text)
    capsys.readouterr()
    assert generated(folder, tmp_path / "videos", "--dry_run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(file) in line
    assert sentence in line


def test_missing_files_are_listed(tmp_path: Path) -> None:
    folder = bake("t2v-A14B", tmp_path / "out")
    shutil.rmtree(folder / "vae")
    next((folder / "transformer_2").glob("*.index.json")).unlink()
    (text,) = problems(folder)
    assert "lacks transformer_2/diffusion_pytorch_model.safetensors.index.json, vae/diffusion_pytorch_model" in text
    assert "hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --local-dir Wan2.2-T2V-A14B-Diffusers" in text


def test_a_release_diffusers_cannot_sample_gets_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = tmp_path / "FastWan2.2-TI2V-5B-lora.safetensors"
    shutil.copy(next(lora_dir("ti2v-5B").glob("*.safetensors")), lora)
    bake("ti2v-5B", tmp_path / "out", "--lora", str(lora))
    assert "warning: ti2v-fastwan-lora is made for re-noising (dmd)" in capsys.readouterr().err


def test_resume_takes_the_same_weights_in_another_layout_for_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(checkpoint("t2v-A14B"), tmp_path / "videos") == 0
    folder = bake("t2v-A14B", tmp_path / "one", "--dtype", "fp32")
    capsys.readouterr()
    assert generated(folder, tmp_path / "videos", "--resume") == 2
    assert "ckpt_dir" in capsys.readouterr().err
