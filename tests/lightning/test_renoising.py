"""The re-noising sampler in a whole task: a seed names a video, with a picture too, on one process and on several."""

from functools import cache

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.support import TINY, checkpoint, config_of, relative_error
from wan.distributed.runtime import Runtime
from wan.modules.model import Prompt
from wan.request.settings import Sampling
from wan.textimage2video import WanTI2V

SAMPLING = Sampling("dmd", 3, 5.0, (1.0, 1.0), (1000.0, 757.0, 522.0))
SIZE, FRAMES = (128, 96), 9


def open_task(runtime: Runtime, ulysses: int = 1) -> WanTI2V:
    device = torch.device("cpu")
    return WanTI2V(config_of("ti2v-5B"), checkpoint("ti2v-5B"), device=device, runtime=runtime, ulysses_size=ulysses)


def picture(pinned: bool) -> Image.Image | None:
    return Image.open(TINY / "input.png").convert("RGB") if pinned else None


def latent_of(task: WanTI2V, pinned: bool, seed: int) -> Tensor:
    return task.sample("a boat", "", picture(pinned), SIZE, FRAMES, seed, SAMPLING)


@cache
def alone() -> WanTI2V:
    return open_task(Runtime())


@pytest.mark.parametrize("pinned", [False, True])
def test_equals_the_formula_with_the_seeds_noise(pinned: bool) -> None:
    task = alone()
    found = latent_of(task, pinned, 5)
    start, model = task.start(picture(pinned), SIZE, FRAMES), task.experts.ready("model", 1.0)
    prompt, generator = Prompt(task._contexts["a boat"]), torch.Generator().manual_seed(5)
    noise = [torch.randn(start.shape, generator=generator) for _ in range(3)]
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
