"""Sampling: the schedules, the plan of steps, and the one denoise loop for all tasks.

Shapes: C latent channels, f, h, w latent frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning.schedule import Draw, EulerSchedule, RenoisingSchedule, levels_at, spaced
from wan.configs.task import TRAIN_TIMESTEPS
from wan.jobs.job import Sampling
from wan.modules.context import Prompt
from wan.modules.model import WanModel
from wan.utils.accelerator import Accelerator
from wan.utils.errors import JobError

# what diffusers' schedulers must be told of flow matching
FLOW = {"num_train_timesteps": TRAIN_TIMESTEPS, "prediction_type": "flow_prediction", "use_flow_sigmas": True}


class Schedule(Protocol):
    """A solver over its timesteps, for one video: multistep solvers remember."""

    timesteps: list[float]
    noise_scale: float  # what the initial noise is multiplied by

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """One step of the plan: what is printed before loading is what runs."""

    timestep: float
    expert: str  # "high", "low" or "model"
    guidance: float  # 1: no unconditional pass
    lora: float  # scale on every LoRA's strength

    @property
    def guided(self) -> bool:
        return abs(self.guidance - 1.0) > 1e-6

    def __str__(self) -> str:
        lora = "" if self.lora == 1.0 else f" lora {self.lora:g}"
        return f"t={self.timestep:.1f} {self.expert} cfg {self.guidance:g}{lora}"


@dataclass(frozen=True)
class Conditioning:
    """What a task gives the loop."""

    text: Prompt
    negative: Prompt | None = None  # None where no step is guided
    channels: Tensor | None = None  # [20, f, h, w] mask and image latent, set beside the noisy latent (I2V)
    first_frame: Tensor | None = None  # [C, 1, h, w] clean latent that stays the first frame (TI2V)


# Called after each step with what it started from and the velocity there, guidance included, both [C, f, h, w].
OnStep = Callable[[Step, Tensor, Tensor], None]


def clean(step: Step, sample: Tensor, velocity: Tensor) -> Tensor:
    """What the latent will be without noise, as far as this step can tell: x - sigma v, sigma = t / 1000."""
    return sample - step.timestep / TRAIN_TIMESTEPS * velocity


class Experts(Protocol):
    """The denoising networks by name."""

    def ready(self, name: str, lora: float) -> WanModel:
        """The network on the compute device, its LoRAs at this scale."""
        ...


def plan_steps(timesteps: Sequence[float], sampling: Sampling, boundary: float | None) -> list[Step]:
    """Which expert, guidance and LoRA scale each timestep gets.

    boundary: the high-noise expert serves timesteps >= 1000 * boundary, unless `sampling.high_steps` counts them out;
    None for a single model.
    """
    plan = []
    for index, timestep in enumerate(timesteps):
        if boundary is None:
            expert = "model"
        elif sampling.high_steps is not None:
            expert = "high" if index < sampling.high_steps else "low"
        else:
            expert = "high" if timestep >= boundary * TRAIN_TIMESTEPS else "low"
        guidance = sampling.guidance[0 if expert == "low" else 1]
        by_step, lora = sampling.guidance_steps, sampling.lora_steps
        plan.append(Step(timestep, expert, by_step[index] if by_step else guidance, lora[index] if lora else 1.0))
    return plan


@torch.no_grad()
def denoise(
    experts: Experts,
    noise: Tensor,
    conditioning: Conditioning,
    schedule: Schedule,
    steps: Sequence[Step],
    on_step: OnStep = lambda *_: None,
) -> Tensor:
    """Noise float32 [C, f, h, w] -> latent of the same shape.

    JobError naming the step at which the latent stopped being finite. On a GPU it comes a step late: nothing waits for
    the device before it has its next step to do.
    """
    text, negative, pinned = conditioning.text, conditioning.negative, conditioning.first_frame
    sample = _pin(schedule.noise_scale * noise, pinned)
    before = steps[0]
    look: Callable[[], None] | None = None
    for index, step in enumerate(steps):
        model = experts.ready(step.expert, step.lora)
        if (step.expert, step.lora) != (before.expert, before.lora):  # the layers made keys of the texts with weights
            before = step  # that are others now, and those keys take room
            for prompt in (text, negative):
                if prompt is not None:
                    prompt.forget()

        latent = sample if conditioning.channels is None else torch.cat([sample, conditioning.channels])
        frames = 0 if pinned is None else pinned.shape[1]
        if step.guided:
            assert negative is not None, "a guided step needs the negative prompt's encoding"
            velocity, free = model(latent, step.timestep, (text, negative), frames)
            velocity = free + step.guidance * (velocity - free)
        else:
            velocity = model(latent, step.timestep, text, frames)

        if look:
            look()
        before_step, sample = sample, _pin(schedule.step(velocity, index, sample), pinned)
        look = _finite_later(
            sample,
            f"the latent has NaN or Inf after step {index + 1} of {len(steps)} ({step}); "
            "a corrupt weight file or an unsuitable attention kernel does this: on a GPU try --attention flash, "
            "or cudnn where flash was used",
        )
        on_step(step, before_step, velocity)
    assert look, "a plan has steps"
    look()
    return sample


def _finite_later(sample: Tensor, problem: str) -> Callable[[], None]:
    """Call it to have JobError(problem) raised if `sample` has NaN or Inf: it then waits for what the device was given
    up to here, and no more. What does one thing after the other raises it at once."""
    finite = torch.isfinite(sample).all()
    accelerator = Accelerator(sample.device)
    if accelerator.has_memory:
        finite = finite.to("cpu", non_blocking=True)  # into pinned memory
    arrived = accelerator.record_event()

    def look() -> None:
        if arrived is not None:
            arrived.synchronize()
        if not finite:
            raise JobError(problem)

    if arrived is None:
        look()
    return look


def _pin(sample: Tensor, frame: Tensor | None) -> Tensor:
    return sample if frame is None else torch.cat([frame, sample[:, frame.shape[1] :]], dim=1)


def make_schedule(sampling: Sampling, draw: Draw | None = None) -> Schedule:
    """A fresh schedule, for one video. draw: where its noise comes from; without it there are only timesteps to see."""
    timesteps, steps, shift = sampling.timesteps, sampling.steps, sampling.shift
    if sampling.solver in ("euler", "dmd"):
        sigmas = spaced(steps, shift) if timesteps is None else levels_at(timesteps)
        return EulerSchedule(sigmas) if sampling.solver == "euler" else RenoisingSchedule(sigmas, draw)
    if timesteps is not None:
        levels, shift = np.array(timesteps) / TRAIN_TIMESTEPS, 1.0
    elif sampling.solver == "unipc":
        # the original's grid starts at the largest training level, 0.999 rounded to float32
        levels = np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1]
    else:
        levels = np.linspace(1.0, 0.0, steps + 1)[:steps]
    return _LibrarySchedule(_unipc(levels, shift) if sampling.solver == "unipc" else _dpmpp(levels, shift))


class _LibrarySchedule:
    """A multistep scheduler of diffusers. Its timesteps are integers, cut down from 1000 sigma as in the original."""

    noise_scale = 1.0

    def __init__(self, scheduler: Any) -> None:
        scheduler.set_begin_index(0)  # else it finds its place by value, and two equal timesteps lead it astray
        self.scheduler = scheduler
        self.timesteps = [float(t) for t in scheduler.timesteps]

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        timestep = self.scheduler.timesteps[index]
        return self.scheduler.step(velocity, timestep, sample, return_dict=False)[0]


def _unipc(levels: np.ndarray, shift: float) -> Any:
    """UniPC (arXiv 2302.04867), order 2, B2(h), predicting x0."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=shift)
    scheduler.set_timesteps(sigmas=levels)
    return scheduler


def _dpmpp(levels: np.ndarray, shift: float) -> Any:
    """DPM-Solver++ (arXiv 2211.01095), order 2, midpoint.

    The class takes no levels of its own and starts at 0.999, the original at 1: its grid is overwritten.
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**FLOW, flow_shift=shift)
    scheduler.set_timesteps(len(levels))
    sigmas = shift * levels / (1 + (shift - 1) * levels)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy(sigmas * TRAIN_TIMESTEPS).to(torch.int64)
    return scheduler
