"""Schedules against the originals' numbers, the plan of steps, and the denoise loop on a closed-form field."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from wan.jobs.job import Sampling
from wan.modules.model import Prompt
from wan.sampling import Conditioning, Schedule, Step, denoise, make_schedule, plan_steps
from wan.utils.errors import JobError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())


def schedule_of(solver: str, steps: int, shift: float, timesteps: tuple[float, ...] | None = None) -> Schedule:
    return make_schedule(Sampling(solver, steps, shift, (1.0, 1.0), timesteps))


def golden_schedule(key: str) -> Schedule:
    solver, steps, shift = key.split("_")
    return schedule_of({"dpmpp": "dpm++"}.get(solver, solver), int(steps[1:]), float(shift.removeprefix("shift")))


def plan_of(timesteps: list[float], boundary: float | None = None, guidance=(1.0, 1.0), **more) -> list[Step]:
    return plan_steps(timesteps, Sampling("euler", len(timesteps), 1.0, guidance, **more), boundary)


@pytest.mark.parametrize("key", GOLDEN["schedules"])
def test_timesteps_and_sigmas_are_the_originals(key: str) -> None:
    schedule = golden_schedule(key)
    assert schedule.timesteps == GOLDEN["schedules"][key]["timesteps"]
    sigmas = getattr(schedule, "sigmas", None)
    sigmas = schedule.scheduler.sigmas if sigmas is None else sigmas
    assert sigmas.tolist() == GOLDEN["schedules"][key]["sigmas"]


@pytest.mark.parametrize("key", GOLDEN["trajectories"])
def test_trajectories_are_the_originals(key: str) -> None:
    """Within 8 steps of float32 at 1 (2^-23 each) on values up to 2; between two processors it is 4 at most.

    The library's logarithms, exponentials and small linear systems go through MKL, which picks its code, and so the
    last bit, by the processor. A shift of 5.001 instead of 5 is off by 380 and more at 4 steps.
    """
    schedule = golden_schedule(key)
    x = torch.tensor([-1.5, -0.4, 0.05, 0.9, 2.0]).view(1, 5, 1, 1, 1)
    for index, t in enumerate(schedule.timesteps):
        x = schedule.step(torch.sin(3 * x) * (0.5 + t / 1000) + 0.1 * x, index, x)
    torch.testing.assert_close(x.flatten(), torch.tensor(GOLDEN["trajectories"][key]), rtol=0, atol=8 * 2**-23)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++", "dmd"])
def test_explicit_timesteps_are_visited_as_given(solver: str) -> None:
    given = [1000.0, 937.5, 833.33, 625.0]
    visited = schedule_of(solver, 4, 5.0, tuple(given)).timesteps
    assert visited == pytest.approx(given, abs=1e-3 if solver in ("euler", "dmd") else 1.0)


def test_duplicate_integer_timesteps_do_not_lead_unipc_astray() -> None:
    schedule = schedule_of("unipc", 100, 12.0)
    assert schedule.timesteps[0] == schedule.timesteps[1]
    x = torch.ones(1, 1, 1, 1, 1)
    for index in range(100):
        x = schedule.step(0.1 * x, index, x)
    assert torch.isfinite(x).all()


def renoised(
    x: np.ndarray, timesteps: Sequence[float], fresh: Sequence[np.ndarray], frame: np.ndarray | None
) -> np.ndarray:
    """The re-noising sampler in plain numpy, float64, on the field of `Waves`. fresh: the noise of each step but the
    last. frame: put over the first latent frame before the first step and after each."""
    sigmas = [t / 1000 for t in timesteps] + [0.0]
    x = sigmas[0] * x
    for index, t in enumerate(timesteps):
        if frame is not None:
            x[:, :1] = frame
        clean = x - sigmas[index] * (np.sin(3 * x) * (0.5 + t / 1000) + 0.1 * x)
        x = clean if index == len(fresh) else (1 - sigmas[index + 1]) * clean + sigmas[index + 1] * fresh[index]
    if frame is not None:
        x[:, :1] = frame
    return x


class Waves:
    """A nonlinear velocity field instead of the network."""

    def ready(self, name: str, lora: float):
        def network(latent, timestep, prompt, pinned):  # noqa: ARG001 - as the model is called
            return torch.sin(3 * latent) * (0.5 + timestep / 1000) + 0.1 * latent

        return network


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("timesteps", [(1000.0, 757.0, 522.0), (1000.0, 750.0, 500.0, 250.0), (987.65, 933.8), None])
def test_renoising_is_what_its_formula_says(timesteps: tuple[float, ...] | None, pinned: bool) -> None:
    shape = (2, 3, 4, 5)
    expected_noise = torch.Generator().manual_seed(7)
    noise, *fresh = [torch.randn(shape, generator=expected_noise) for _ in range(len(timesteps or "four"))]
    frame = torch.full((2, 1, 4, 5), 0.3) if pinned else None
    generator, drawn = torch.Generator().manual_seed(7), []

    def draw(size: Sequence[int]) -> torch.Tensor:
        drawn.append(tuple(size))
        return torch.randn(tuple(size), generator=generator)

    schedule = make_schedule(Sampling("dmd", 4, 5.0, (1.0, 1.0), timesteps), draw)
    condition = Conditioning(Prompt(torch.tensor(1.0)), first_frame=frame)
    found = denoise(Waves(), draw(shape), condition, schedule, plan_of(schedule.timesteps))
    levels = timesteps or [1000 * 5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25)]
    assert schedule.timesteps == pytest.approx(levels, abs=1e-3)
    fresh_noise = [tensor.double().numpy() for tensor in fresh]
    expected = renoised(noise.double().numpy(), levels, fresh_noise, None if frame is None else frame.numpy())
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    assert drawn == [shape] * len(levels), "one draw to begin with, one for each step but the last"


def test_renoising_is_not_euler() -> None:
    x, velocity = torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.5)
    dmd = make_schedule(Sampling("dmd", 2, 1.0, (1.0, 1.0)), lambda shape: torch.zeros(tuple(shape)))
    assert dmd.step(velocity, 0, x).unique().item() == 0.25  # (1 - 0.5) * (1 - 1 * 0.5) + 0.5 * 0
    assert schedule_of("euler", 2, 1.0).step(velocity, 0, x).unique().item() == 0.75


def experts_of(timesteps: list[float], boundary: float, **more: int) -> str:
    plan = plan_of(timesteps, boundary, (3.0, 4.0), **more)
    assert all(step.guidance == (4.0 if step.expert == "high" else 3.0) for step in plan)
    return "".join(step.expert[0] for step in plan)


@pytest.mark.parametrize(
    ("steps", "shift", "boundary", "high"),
    [(4, 5, 0.875, 2), (4, 5, 0.9, 2), (8, 5, 0.875, 4), (8, 5, 0.9, 3), (4, 8, 0.875, 3), (12, 5, 0.875, 6)],
)
def test_expert_boundary_counts(steps: int, shift: float, boundary: float, high: int) -> None:
    plan = experts_of(schedule_of("euler", steps, shift).timesteps, boundary)
    assert plan == "h" * high + "l" * (steps - high)


def test_a_timestep_on_the_boundary_is_high() -> None:
    timesteps = schedule_of("euler", 12, 5.0).timesteps
    assert 875.0 in timesteps
    assert experts_of([875.0, 874.9], 0.875) == "hl"


def test_base_schedules_split_as_the_originals() -> None:
    assert experts_of(schedule_of("unipc", 40, 12.0).timesteps, 0.875).count("h") == 26
    assert experts_of(schedule_of("unipc", 40, 5.0).timesteps, 0.9).count("h") == 15


def test_explicit_counts_and_scales_win() -> None:
    assert experts_of([1000.0, 900.0, 800.0], 0.875, high_steps=1) == "hll"
    plan = plan_of([1000.0, 500.0], guidance_steps=(3.5, 1.0), lora_steps=(0.0, 1.0))
    assert plan == [Step(1000.0, "model", 3.5, 0.0), Step(500.0, "model", 1.0, 1.0)]
    assert str(plan[0]) == "t=1000.0 model cfg 3.5 lora 0"


class Field:
    """A velocity field instead of the network, which records its inputs."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.asked = value, []

    def ready(self, name: str, lora: float):
        def network(latent, timestep, prompt, pinned):
            if not isinstance(prompt, Prompt):
                return torch.stack([network(latent, timestep, each, pinned) for each in prompt])
            self.asked.append((name, lora, timestep, prompt.rows.item(), latent.shape[0], pinned))
            return torch.full_like(latent[:2], self.value * prompt.rows.item())

        return network


def test_guidance_runs_both_passes_only_where_the_scale_is_not_one() -> None:
    field, schedule = Field(), schedule_of("euler", 2, 1.0)
    steps = [Step(1000.0, "high", 3.0, 1.0), Step(500.0, "low", 1.0, 1.0)]
    text, negative = Prompt(torch.tensor(2.0)), Prompt(torch.tensor(1.0))
    x = denoise(field, torch.zeros(2, 1, 1, 1), Conditioning(text, negative), schedule, steps)
    assert [(a[0], a[3]) for a in field.asked] == [("high", 2.0), ("high", 1.0), ("low", 2.0)]
    assert x.unique().item() == pytest.approx(-0.5 * (1 + 3 * (2 - 1)) - 0.5 * 2)


def test_channels_are_set_beside_and_the_first_frame_stays() -> None:
    field, schedule = Field(), schedule_of("euler", 2, 1.0)
    steps = plan_of(schedule.timesteps)
    frame = torch.full((2, 1, 1, 1), 7.0)
    condition = Conditioning(Prompt(torch.tensor(1.0)), channels=torch.zeros(3, 2, 1, 1), first_frame=frame)
    x = denoise(field, torch.zeros(2, 2, 1, 1), condition, schedule, steps)
    assert {(a[4], a[5]) for a in field.asked} == {(5, 1)}
    assert x[:, 0].unique().item() == 7.0
    assert x[:, 1].unique().item() == pytest.approx(-1.0)


def test_a_changed_lora_scale_makes_the_layers_read_the_prompt_again() -> None:
    text, negative = (Prompt(torch.tensor(1.0)) for _ in range(2))
    layer = torch.nn.Identity()
    for prompt in (text, negative):
        prompt.once(layer, lambda: "old")
    steps = [Step(1000.0, "high", 1.0, 0.0), Step(500.0, "high", 1.0, 1.0)]
    denoise(Field(), torch.zeros(2, 1, 1, 1), Conditioning(text, negative), schedule_of("euler", 2, 1.0), steps)
    assert [prompt.once(layer, lambda: "fresh") for prompt in (text, negative)] == ["fresh"] * 2


@pytest.mark.gpu
def test_on_a_gpu_nan_names_its_step_one_step_late() -> None:
    """The step after it has been asked for, and the one after that has not."""
    device, field, schedule = torch.device("cuda"), Field(), schedule_of("euler", 4, 5.0)
    text = Prompt(torch.tensor(1.0))

    def spoil(step: Step, *_: torch.Tensor) -> None:
        field.value = float("nan") if step is steps[0] else 1.0

    steps = plan_of(schedule.timesteps, 0.875)
    with pytest.raises(JobError, match="after step 2 of 4"):
        denoise(field, torch.zeros(2, 1, 1, 1, device=device), Conditioning(text), schedule, steps, spoil)
    assert len(field.asked) == 3


def test_nan_stops_the_job_and_names_the_step() -> None:
    schedule = schedule_of("euler", 4, 5.0)
    steps = plan_of(schedule.timesteps, 0.875)
    with pytest.raises(JobError, match=r"after step 1 of 4 \(t=1000.0 high cfg 1\)"):
        denoise(Field(float("nan")), torch.zeros(2, 1, 1, 1), Conditioning(Prompt(torch.tensor(1.0))), schedule, steps)
