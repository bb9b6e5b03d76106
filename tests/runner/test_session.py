"""`wan.open`: one set of networks for videos with other settings, equal to runs of their own."""

import json
from pathlib import Path

import pytest
import torch

import wan
from tests.support import checkpoint, lora_dir
from wan.runner.session import Session
from wan.sampling import Step
from wan.utils.errors import InputError

TASK = "t2v-A14B"
SMALL = {"size": "32*32", "frame_num": 1, "sample_steps": 2, "base_seed": 1, "device": "cpu"}
LORA = {"lora_dir": str(lora_dir(TASK))}


def open_session(**options: object) -> Session:
    return wan.open(TASK, checkpoint(TASK), **SMALL, **options)


def bytes_read(session: Session) -> int:
    assert session.pipe is not None
    assert session.pipe.experts is not None
    return session.pipe.experts.brought


@pytest.mark.parametrize("mode", ["merge", "adapter"])
def test_another_strength_equals_a_session_of_its_own(mode: str) -> None:
    one = open_session(**LORA, lora_mode=mode)
    found = {s: one.generate("a cat", lora_strength=s).latent for s in ("1", "0.25", "0.5,1", "1")}
    networks = one.pipe.experts  # type: ignore[union-attr]
    assert torch.equal(one.generate("a cat", lora_strength=(0.5, 1)).latent, found["0.5,1"]), "values of Python too"
    for strength, latent in found.items():
        alone = open_session(**LORA, lora_mode=mode)
        assert torch.equal(latent, alone.generate("a cat", lora_strength=strength).latent)
    assert len({latent.sum().item() for latent in found.values()}) == 3
    assert one.pipe.experts is networks  # type: ignore[union-attr]


def test_a_lora_that_is_left_out_again_leaves_the_weights() -> None:
    """A LoRA of one expert or of both is gone in the next video."""
    files = {expert: str(lora_dir(TASK) / f"{expert}_noise_model.safetensors") for expert in ("high", "low")}
    session, alone = open_session(sample_shift=1.0), {}  # the second step is the low-noise expert's
    for experts in (("high", "low"), ("high",), (), ("low",)):
        loras = [f"{expert}={files[expert]}" for expert in experts]
        options = {"lora": loras} if loras else {}
        found = session.generate("a cat", **options).latent
        alone[experts] = open_session(sample_shift=1.0).generate("a cat", **options).latent
        assert torch.equal(found, alone[experts]), experts
    assert len({latent.sum().item() for latent in alone.values()}) == 4


def test_settings_of_the_sampling_read_no_weight_again() -> None:
    session = open_session(**LORA)
    first = session.generate("a cat")
    read = bytes_read(session)
    assert session.pipe._text_encoder is None, "between videos it takes no memory"  # type: ignore[union-attr]
    other = session.generate("a cat", sample_shift=3.0, base_seed=2)
    assert bytes_read(session) == read
    assert not torch.equal(first.latent, other.latent)
    assert torch.equal(session.generate("a cat").latent, first.latent)
    session.generate("a cat", lora_strength="0.5")
    assert bytes_read(session) > read, "merged blocks are read again"


def test_other_weights_are_loaded_anew() -> None:
    session = open_session(**LORA)
    base = session.generate("a cat", dtype="fp32").latent
    rounded = session.generate("a cat", dtype="bf16").latent
    assert torch.equal(rounded, open_session(**LORA).generate("a cat", dtype="bf16").latent), "texts are encoded anew"
    assert torch.equal(session.generate("a cat", dtype="fp32").latent, base)


def test_a_hook_sees_each_step_and_may_replace_the_velocity() -> None:
    session, seen = open_session(**LORA), list[float]()

    def at_rest(step: Step, _: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        seen.append(step.timestep)
        return torch.zeros_like(velocity)

    noise = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    result = session.generate("a cat", on_step=at_rest, noise=noise)
    assert len(seen) == 2
    assert torch.allclose(result.latent, noise)
    assert torch.equal(session.decode(result.latent), result.video)


def test_a_schedule_of_ones_own() -> None:
    class TwoSteps:
        """Euler at two noise levels."""

        noise_scale = 1.0

        def __init__(self) -> None:
            self.timesteps = [1000.0, 500.0]

        def step(self, velocity: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
            return sample - 0.5 * velocity

    session = open_session(**LORA)
    own = session.generate("a cat", schedule=TwoSteps())
    assert torch.allclose(own.latent, session.generate("a cat", timesteps="1000,500").latent, atol=1e-5)
    assert own.record["meaning"]["sample_solver"] == "TwoSteps"


def test_a_result_is_saved_with_its_record(tmp_path: Path) -> None:
    result = open_session(**LORA).generate("a cat", lora_strength="0.5")
    result.save(tmp_path / "cat.mp4")
    record = json.loads((tmp_path / "cat.json").read_text())
    assert record["request"]["lora_strength"] == "0.5"
    assert record["output"]["frames"] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [({"strength": 1}, "strength"), ({"frame_num": "many"}, "--frame_num"), ({"num_videos": 2}, "one video")],
)
def test_bad_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        open_session(**LORA).generate("a cat", **options)


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match="noise"):
        open_session(**LORA).generate("a cat", noise=torch.zeros(16, 2, 4, 4))
