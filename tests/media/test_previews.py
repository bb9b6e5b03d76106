"""A strip of what the video will be, a picture a step: right pictures, the same video, on one process and on two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import generate
from tests.distributed.ranks import run_ranks
from tests.support import TINY, checkpoint, lora_dir
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.media.images import GAP, LINE, Strip
from wan.planning.build import make_plan
from wan.runner.batch import open_pipeline, run_jobs
from wan.sampling import Step, predict_clean
from wan.utils.progress import Progress


def words(task: str, folder: Path) -> list[str]:
    image = [] if task == "t2v-A14B" else ["--image", str(TINY / "input.png")]
    weights = ["--task", task, "--ckpt_dir", str(checkpoint(task)), "--lora_dir", str(lora_dir(task)), *image]
    small = ["--size", "64*64", "--frame_num", "9", "--base_seed", "3", "--device", "cpu", "--save_latents"]
    return [*weights, *small, "--prompt", "a", "--sample_steps", "3", "--save_file", str(folder / "x.mp4")]


def pictures(strip: Path, count: int) -> list[np.ndarray]:
    with Image.open(strip) as sheet:
        pixels = np.array(sheet)[: sheet.height - LINE]
    width = (pixels.shape[1] + GAP) // count
    return [pixels[:, start : start + width - GAP] for start in range(0, pixels.shape[1], width)]


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
def test_a_picture_a_step_and_the_same_video(task: str, tmp_path: Path) -> None:
    one, other = tmp_path / "with", tmp_path / "without"
    assert generate.main([*words(task, one), "--preview_steps"]) == 0
    assert generate.main(words(task, other)) == 0
    latent = load_file(one / "x.latents.safetensors")["latent"]
    assert torch.equal(latent, load_file(other / "x.latents.safetensors")["latent"])
    assert not (other / "x.steps.png").exists()
    shown = pictures(one / "x.steps.png", 3)
    assert len(shown) == 3
    assert not np.array_equal(shown[0], shown[-1])

    image = None if task == "t2v-A14B" else str(TINY / "input.png")
    outcome = resolve({"task": task, "ckpt_dir": str(checkpoint(task)), "prompt": "a", "image": image,
                       "size": "64*64", "frame_num": 9, "device": "cpu", "save_dir": str(tmp_path)})  # fmt: skip
    pipe = open_pipeline(make_plan(outcome, Runtime()), Progress(quiet=True), Runtime())
    # Euler's last step goes down to sigma 0: what it predicts is the final latent itself
    wanted = Strip(tmp_path / "final.png")
    frame = pipe.look(latent)
    assert frame is not None
    wanted.add(frame)
    difference = shown[-1].astype(int) - pictures(wanted.path, 1)[0].astype(int)
    assert np.abs(difference).max() <= 1


def test_the_prediction_of_a_straight_path_is_its_end() -> None:
    end, noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for timestep in (1000.0, 937.5, 20.0):
        sample = end + timestep / 1000 * (noise - end)
        assert torch.allclose(predict_clean(Step(timestep, "low", 1.0, 1.0), sample, noise - end), end, atol=1e-6)


def test_the_strip_grows(tmp_path: Path) -> None:
    strip = Strip(tmp_path / "s.png")
    for count in (1, 2, 3):
        strip.add(torch.full((3, 90, 640), count / 4))
        with Image.open(strip.path) as sheet:
            assert sheet.size == (count * (320 + GAP) - GAP, 45 + LINE)
            assert sheet.getpixel((sheet.width - 1, 0)) == (round((count / 4 + 1) * 127.5),) * 3
            labels = np.array(sheet)[45:]
            assert [labels[:, n * (320 + GAP) : n * (320 + GAP) + 40].any() for n in range(count)] == [True] * count


def test_a_strip_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.steps.png").write_bytes(b"mine")
    asked = [*words("t2v-A14B", tmp_path), "--preview_steps", "--dry_run"]
    assert generate.main(asked) == 2
    assert "x.steps.png already exists" in capsys.readouterr().err
    assert generate.main([*asked, "--resume"]) == 0, "a run that was killed leaves one"


def run_together(runtime: Runtime, given: dict) -> int:
    outcome = resolve(given)
    assert isinstance(outcome, Generate)
    return run_jobs(make_plan(outcome, runtime), Progress(quiet=True), runtime)


def test_two_processes_make_one_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    task = "t2v-A14B"
    given = {"task": task, "ckpt_dir": str(checkpoint(task)), "lora_dir": str(lora_dir(task)), "prompt": "a",
             "size": "64*64", "frame_num": 9, "base_seed": 3, "device": "cpu", "sample_steps": 3, "preview_steps": True,
             "ulysses_size": 2, "save_file": str(tmp_path / "x.mp4")}  # fmt: skip
    assert run_ranks(run_together, 2, given) == [0, 0]
    monkeypatch.delenv("WORLD_SIZE")
    assert generate.main([*words(task, tmp_path / "one"), "--preview_steps"]) == 0
    for ours, theirs in zip(*(pictures(f / "x.steps.png", 3) for f in (tmp_path, tmp_path / "one")), strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert json.loads((tmp_path / "x.json").read_text())["request"]["preview_steps"] is True
