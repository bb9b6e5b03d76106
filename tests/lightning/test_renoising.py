"""The re-noising sampler in a whole task: a seed names a video, with a picture too, on one process and on several."""

from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import generate
from tests.distributed.ranks import run_ranks
from tests.support import TINY, checkpoint, config_of, relative_error
from wan.distributed.launch import Runtime
from wan.jobs.job import Sampling
from wan.modules.model import Prompt
from wan.sampling import Video
from wan.textimage2video import WanTI2V

SAMPLING = Sampling("dmd", 3, 5.0, (1.0, 1.0), (1000.0, 757.0, 522.0))
SIZE, FRAMES = (128, 96), 9


def open_task(runtime: Runtime, ulysses: int = 1) -> WanTI2V:
    device = torch.device("cpu")
    return WanTI2V(config_of("ti2v-5B"), checkpoint("ti2v-5B"), device=device, runtime=runtime, ulysses_size=ulysses)


def picture(pinned: bool) -> Image.Image | None:
    return Image.open(TINY / "input.png").convert("RGB") if pinned else None


def boat(pinned: bool, seed: int) -> Video:
    return Video("a boat", "", SIZE, FRAMES, seed, picture(pinned))


def latent_of(task: WanTI2V, pinned: bool, seed: int) -> Tensor:
    return task.sample_with(SAMPLING, boat(pinned, seed))


@cache
def alone() -> WanTI2V:
    return open_task(Runtime())


@pytest.mark.parametrize("pinned", [False, True])
def test_equals_the_formula_with_the_seeds_noise(pinned: bool) -> None:
    task = alone()
    found = latent_of(task, pinned, 5)
    start, model = task.start(boat(pinned, 5)), task.experts.ready("model", 1.0)
    prompt, generator = Prompt(task._contexts["a boat"]), torch.Generator().manual_seed(5)
    noise = [torch.randn(found.shape, generator=generator) for _ in range(3)]
    x, sigmas = noise[0], (1.0, 0.757, 0.522, 0.0)
    with torch.no_grad():
        for index in range(3):
            if pinned:
                x[:, :1] = start.first_frame
            clean = x - sigmas[index] * model(x, 1000 * sigmas[index], prompt, int(pinned))
            x = (1 - sigmas[index + 1]) * clean + (sigmas[index + 1] * noise[index + 1] if index < 2 else 0)
    if pinned:
        x[:, :1] = start.first_frame
    assert relative_error(found, x) < 1e-5


def test_a_seed_names_a_video() -> None:
    first = latent_of(alone(), True, 5)
    assert not torch.equal(latent_of(alone(), True, 6), first)
    assert torch.equal(latent_of(alone(), True, 5), first)


def work(runtime: Runtime, pinned: bool) -> Tensor:
    torch.manual_seed(100 + runtime.team.rank)  # the ranks' own random state must not matter
    return latent_of(open_task(runtime, ulysses=2), pinned, 5)


@pytest.mark.parametrize("pinned", [False, True])
def test_two_ranks_make_what_one_makes(pinned: bool) -> None:
    expected = latent_of(alone(), pinned, 5)
    for found in run_ranks(work, 2, pinned):
        assert relative_error(found, expected) < 1e-5


def names_of(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


@pytest.mark.parametrize("pinned", [False, True])
def test_resume_and_replay_make_the_same_latents(pinned: bool, tmp_path: Path) -> None:
    command = ["--task", "ti2v-5B", "--ckpt_dir", str(checkpoint("ti2v-5B")), "--prompt", "a boat", "--size", "64*64",
               "--frame_num", "5", "--sample_solver", "dmd", "--timesteps", "1000,757,522", "--sample_guide_scale", "1",
               "--num_videos", "2", "--base_seed", "5", "--save_latents", "--save_dir", str(tmp_path)]  # fmt: skip
    command += ["--image", str(TINY / "input.png")] if pinned else []
    assert generate.main(command) == 0
    first, second = names_of(tmp_path, ".latents.safetensors")
    expected = [load_file(file)["latent"] for file in (first, second)]
    assert not torch.equal(*expected), "each seed has its own fresh noise"
    left = [file.stat().st_mtime_ns for file in names_of(tmp_path, ".mp4")[:1]]
    for suffix in (".mp4", ".json", ".latents.safetensors"):
        names_of(tmp_path, suffix)[1].unlink()
    assert generate.main([*command, "--resume"]) == 0
    assert [file.stat().st_mtime_ns for file in names_of(tmp_path, ".mp4")[:1]] == left, "the finished one is left"
    assert torch.equal(load_file(second)["latent"], expected[1])
    again = tmp_path / "again.mp4"
    assert generate.main(["--replay", str(names_of(tmp_path, ".mp4")[1]), "--save_file", str(again)]) == 0
    assert torch.equal(load_file(tmp_path / "again.latents.safetensors")["latent"], expected[1])
