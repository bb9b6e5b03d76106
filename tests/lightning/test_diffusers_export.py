"""`bake --layout diffusers`: the real pipelines load the folder and make what we make, LoRA merged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning.__main__ import main
from tests.lightning.support import base
from tests.support import TINY, checkpoint, config_of, lora_dir, relative_error
from tests.test_golden import CLASSES
from wan.checkpoints.key_mapping import original, original_text, original_vae
from wan.checkpoints.pth_file import open_pickle
from wan.checkpoints.safetensors_file import TensorStore
from wan.configs import TASKS
from wan.jobs.job import Sampling
from wan.sampling import Video, spaced

SIZE, FRAMES, STEPS, SEED, PROMPT = (64, 96), 9, 4, 5, "a red ball, “quoted” ＡＢ"
VAES = {task: config.vae_checkpoint for task, config in TASKS.items()}


def bake(task: str, out: Path, *more: str) -> Path:
    arguments = ["--task", task, "--ckpt_dir", str(checkpoint(task)), "--out", str(out), "--layout", "diffusers"]
    assert main(["bake", *arguments, "--dtype", "fp32", *more]) == 0
    return out


def pipeline(folder: Path, task: str, exact: bool = True) -> Any:
    """The real pipeline; its scheduler visits our levels, which no setting makes it do, or its own."""
    import diffusers

    kind = diffusers.WanImageToVideoPipeline if task == "i2v-A14B" else diffusers.WanPipeline
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32)
    if exact:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        levels, choose = spaced(STEPS, 5.0)[:-1], scheduler.set_timesteps
        scheduler.set_timesteps = lambda _, device=None: choose(sigmas=levels.astype(np.float32), device=device)
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours_and_theirs(task: str, folder: Path, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Latents of one video: [C, f, h, w]."""
    own = CLASSES[task](config_of(task), checkpoint(task), lora_dir=lora_dir(task), device=torch.device("cpu"))
    image = Image.open(TINY / "input.png").convert("RGB").resize(SIZE) if task == "i2v-A14B" else None
    ours = own.sample_with(Sampling("euler", STEPS, 5.0, (1.0, 1.0)), Video(PROMPT, "", SIZE, FRAMES, SEED, image))
    noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(SEED))
    given = {"image": image} if image else {}
    theirs = pipeline(folder, task, exact)(
        prompt=PROMPT, width=SIZE[0], height=SIZE[1], num_frames=FRAMES, num_inference_steps=STEPS, guidance_scale=1.0,
        latents=noise[None].clone(), output_type="latent", **given,
    ).frames[0]  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize("task", TASKS)
def test_the_real_pipeline_makes_our_latents(task: str, tmp_path: Path) -> None:
    folder = bake(task, tmp_path / "out", "--lora_dir", str(lora_dir(task)))
    ours, theirs = ours_and_theirs(task, folder)
    assert relative_error(theirs, ours) < 2e-5  # measured: 3e-6


def test_with_the_scheduler_of_the_folder_it_is_nearly_the_same(tmp_path: Path) -> None:
    folder = bake("t2v-A14B", tmp_path / "out", "--lora_dir", str(lora_dir("t2v-A14B")))
    ours, theirs = ours_and_theirs("t2v-A14B", folder, exact=False)
    assert relative_error(theirs, ours) < 4e-2  # measured: 2.0e-2, of levels that differ by 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_there_and_back_every_bit_is_the_same(task: str, tmp_path: Path) -> None:
    folder, source = bake(task, tmp_path / "out"), checkpoint(task)
    before = {
        folder_name: base(task, where)
        for folder_name, where in zip(("transformer", "transformer_2"), TASKS[task].experts.values(), strict=False)
    }
    others = {"vae": source / VAES[task], "text_encoder": source / "models_t5_umt5-xxl-enc-bf16.pth"}
    back = {"vae": original_vae, "text_encoder": original_text}
    for place, store in (before | {name: open_pickle(path) for name, path in others.items()}).items():
        index = next((folder / place).glob("*.safetensors.index.json"))
        found = TensorStore.open(index)
        names = back.get(place, original)(found)
        assert sorted(names.values()) == sorted(store)
        for theirs, ours in names.items():
            tensor = found.read(theirs)
            assert tensor.dtype == store.read(ours).dtype
            assert torch.equal(tensor, store.read(ours))
    for file in (source / "google" / "umt5-xxl").iterdir():
        assert (folder / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_missing_files_are_named_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = tmp_path / "experts"
    experts.mkdir()
    for where in TASKS["t2v-A14B"].experts.values():
        (experts / where).symlink_to(checkpoint("t2v-A14B") / where)
    arguments = ["bake", "--task", "t2v-A14B", "--ckpt_dir", str(experts), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--layout", "diffusers"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "lacks models_t5_umt5-xxl-enc-bf16.pth, Wan2.1_VAE.pth, google/umt5-xxl/tok" in error
    (experts / "google").symlink_to(checkpoint("t2v-A14B") / "google")
    (experts / "Wan2.1_VAE.pth").write_bytes(b"no pickle")
    (experts / "models_t5_umt5-xxl-enc-bf16.pth").symlink_to(experts / "Wan2.1_VAE.pth")
    assert main([*arguments, "--layout", "diffusers"]) == 2
    assert "truncated or damaged, or not a zipped .pth file" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_the_record_stays_with_the_folder(tmp_path: Path) -> None:
    folder = bake("ti2v-5B", tmp_path / "out", "--lora_dir", str(lora_dir("ti2v-5B")))
    record = json.loads((folder / "bake.json").read_text())
    assert record["layout"] == "diffusers"
    assert record["release"]["steps"] == STEPS
    assert len(record["loras"]["model"]) == 1
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["flow_shift"], scheduler["solver_order"]) == (5.0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_in_diffusers_layout_is_a_base_as_well(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ["--lora_dir", str(lora_dir(task))]
    plain, expected = bake(task, tmp_path / "plain"), bake(task, tmp_path / "once", *lora)
    arguments = ["--task", task, "--ckpt_dir", str(plain), "--dtype", "fp32", *lora]
    assert main(["bake", *arguments, "--out", str(tmp_path / "twice"), "--layout", "diffusers"]) == 0
    files = {file.relative_to(expected) for file in expected.rglob("*") if file.is_file()} - {Path("bake.json")}
    assert len(files) > 10
    assert all((tmp_path / "twice" / file).read_bytes() == (expected / file).read_bytes() for file in files)
    capsys.readouterr()
    assert main(["inspect", str(lora_dir(task)), "--ckpt_dir", str(plain)]) == 0
    assert capsys.readouterr().out.count("20/20 pairs") == len(TASKS[task].experts)
    assert main(["inspect", str(plain)]) == 0
    assert f"generate.py --task {task} --ckpt_dir {plain}" in capsys.readouterr().out
    assert main(["bake", *arguments, "--out", str(tmp_path / "no")]) == 2
    assert "--layout diffusers" in capsys.readouterr().err
    next((plain / "vae").glob("*.index.json")).unlink()
    assert main(["bake", *arguments, "--out", str(tmp_path / "no"), "--layout", "diffusers"]) == 2
    assert f"--ckpt_dir {plain} lacks vae/" in capsys.readouterr().err
