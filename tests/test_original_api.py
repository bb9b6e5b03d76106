"""The original's classes: what they refuse, and what they leave alone."""

from collections.abc import Iterator

import pytest
import torch

import wan
from tests.support import checkpoint, config_of
from wan.utils.errors import InputError

TASK = "t2v-A14B"


@pytest.fixture(scope="module")
def pipe() -> wan.WanT2V:
    return wan.WanT2V(config_of(TASK), checkpoint(TASK), device="cpu")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"size": (97, 64)}, "size 97*64: both sides must be multiples of 16; the nearest is 96*64"),
        ({"frame_num": 4}, "frame_num 4 is not of the form 4n+1; the nearest valid values are 1 or 5"),
        ({"sample_solver": "ddim"}, "sample_solver 'ddim' is not one of euler, unipc, dpm++"),
        ({"sampling_steps": 0}, "sampling_steps 0 is out of range"),
        ({"shift": float("nan")}, "shift nan is out of range"),
    ],
)
def test_the_python_api_refuses_what_the_command_line_refuses(pipe: wan.WanT2V, more: dict, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        pipe.generate("a cat", **{"size": (64, 48), "frame_num": 5, **more})
    assert sentence in str(raised.value)


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="'ulysses' is not an option of this program"):
        wan.WanT2V(config_of(TASK), checkpoint(TASK), device="cpu", ulysses=2)


def test_a_drawn_seed_leaves_the_callers_random_numbers_alone(pipe: wan.WanT2V) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    size = {"size": (64, 48), "frame_num": 1, "sampling_steps": 1, "sample_solver": "euler", "guide_scale": 1.0}
    first, second = (pipe.generate("a cat", **size) for _ in range(2))
    assert torch.equal(torch.rand(3), want)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


def test_no_room_for_the_decode_leads_to_tiles(pipe: wan.WanT2V, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, ways = pipe.decode, []

    def full(latent: torch.Tensor, *, finer: bool) -> Iterator[torch.Tensor]:
        ways.append(finer)
        if not finer:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from decode(latent, finer=finer)

    given = {"size": (64, 48), "frame_num": 5, "sampling_steps": 1, "guide_scale": 1.0, "seed": 1}
    whole = pipe.generate("a cat", **given)
    monkeypatch.setattr(pipe, "decode", full)
    tiled = pipe.generate("a cat", **given)
    assert ways == [False, True]
    assert whole is not None
    assert tiled is not None
    assert torch.allclose(whole, tiled, atol=1e-4)
