"""Sampling: the schedules, the plan of steps, and the one denoise loop of all tasks.

x_sigma = (1 - sigma) x0 + sigma noise, the network predicts v = noise - x0, so dx/dsigma = v and x0 = x - sigma v
(Lipman et al., arXiv 2210.02747); timestep = 1000 sigma.

Shapes: C latent channels, f, h, w latent frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan.configs.task import TRAIN_TIMESTEPS
from wan.jobs.job import Sampling
from wan.modules.model import Prompt
from wan.utils.accelerator import Accelerator
from wan.utils.errors import JobError

# settings of diffusers' schedulers for flow matching
FLOW = {"num_train_timesteps": TRAIN_TIMESTEPS, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
Draw = Callable[[Sequence[int]], Tensor]  # shape -> the next standard normal numbers of the video's generator


class Schedule(Protocol):
    """A solver over its timesteps, for one video: multistep solvers keep state."""

    timesteps: list[float]
    sigmas: Any  # noise levels: that of each timestep, and the last step's end
    noise_scale: float  # factor of the initial noise

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Video:
    """One video to sample. size: (width, height)."""

    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    frame_num: int
    seed: int
    image: Image.Image | None = None
    last_image: Image.Image | None = None
    video: Tensor | None = None  # [3, F, H, W] in [-1, 1], which it is made from


@dataclass(frozen=True)
class Step:
    """One step of the plan, as printed and as run."""

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


class Denoisers(Protocol):  # `Experts`, or a wrapper around them
    def ready(self, name: str, lora: float) -> Callable[..., Tensor]: ...


class Windows:
    """Wraps the networks of one video: blends their velocities for windows (first, end, text) of a latent.
    Weights fall linearly to a window's edges (arXiv 2302.08113)."""

    def __init__(self, inner: Denoisers, windows: Sequence[tuple[int, int, Prompt]]) -> None:
        self.inner, self.windows = inner, windows

    def ready(self, name: str, lora: float) -> Callable[..., Tensor]:
        return partial(self._blend, self.inner.ready(name, lora))

    def _blend(self, model: Callable[..., Tensor], latent: Tensor, time: float, prompts: Any, _: int) -> Tensor:
        negative = () if isinstance(prompts, Prompt) else prompts[1:]
        total, weights = latent.new_zeros(1 + len(negative), *latent.shape), latent.new_zeros(latent.shape[1], 1, 1)
        for number, (first, end, text) in enumerate(self.windows, 1):
            frames = torch.arange(first, end, device=latent.device)[:, None, None]
            weight = (frames + 1 - first).minimum(end - frames)
            total[:, :, first:end] += weight * model(latent[:, first:end], time, [text, *negative], 0)
            weights[first:end] += weight
            if text is not self.windows[number % len(self.windows)][2]:
                text.forget()  # its keys and values take memory
        return total / weights if negative else total[0] / weights


@dataclass(frozen=True)
class Conditioning:
    """Input of the loop besides noise."""

    text: Prompt
    negative: Prompt | None = None  # of guided steps, or for NAG
    channels: Tensor | None = None  # [20, f, h, w] mask and image latent, beside the noisy latent (I2V)
    first_frame: Tensor | None = None  # [C, 1, h, w] clean latent that stays the first frame (TI2V)
    video: Tensor | None = None  # [C, f, h, w] clean latent that the noise of the first level is added to


# Called in each step with the sample and the velocity there, guidance included, both [C, f, h, w]. A tensor that it
# returns takes the velocity's place; the sample may be changed where it is.
OnStep = Callable[[Step, Tensor, Tensor], Tensor | None]


def predict_clean(step: Step, sample: Tensor, velocity: Tensor) -> Tensor:
    """Prediction of the latent without noise: x - sigma v, sigma = t / 1000."""
    return sample - step.timestep / TRAIN_TIMESTEPS * velocity


def plan_steps(timesteps: Sequence[float], sampling: Sampling, boundary: float | None) -> list[Step]:
    """Expert, guidance and LoRA scale of each timestep.
    boundary: the high-noise expert serves timesteps >= 1000 * boundary, or the first `sampling.high_steps`; None for a
    single model."""
    plan, count = [], sampling.high_steps
    for index, timestep in enumerate(timesteps):
        expert = "model"
        if boundary is not None:
            is_high = timestep >= boundary * TRAIN_TIMESTEPS if count is None else index < count
            expert = "high" if is_high else "low"
        guidance = sampling.guidance[0 if expert == "low" else 1]
        by_step, lora = sampling.guidance_steps, sampling.lora_steps
        plan.append(Step(timestep, expert, by_step[index] if by_step else guidance, lora[index] if lora else 1.0))
    return plan


@torch.no_grad()
def denoise(
    experts: Denoisers, noise: Tensor, conditioning: Conditioning, schedule: Schedule, steps: Sequence[Step],
    on_step: OnStep = lambda *_: None,
) -> Tensor:  # fmt: skip
    """Noise float32 [C, f, h, w] -> latent of the same shape.
    JobError naming the step after which the latent is not finite. On a GPU it comes one step late, so that the device
    has its next step to do while the host waits."""
    text, negative, pinned = conditioning.text, conditioning.negative, conditioning.first_frame
    frames, before = 0 if pinned is None else pinned.shape[1], steps[0]
    sample = _pin(schedule.noise_scale * noise, pinned)
    if conditioning.video is not None:
        sample = torch.lerp(conditioning.video, noise, float(schedule.sigmas[0]))
    check: Callable[[], None] | None = None
    for index, step in enumerate(steps):
        model = experts.ready(step.expert, step.lora)
        if (step.expert, step.lora) != (before.expert, before.lora):
            before = step  # the kept keys and values of the texts come from other weights, and take memory
            text.forget()
            if negative is not None:
                negative.forget()
        latent = sample if conditioning.channels is None else torch.cat([sample, conditioning.channels])
        if step.guided:
            assert negative is not None, "a guided step needs the negative prompt's encoding"
            velocity, free = model(latent, step.timestep, (text, negative), frames)
            velocity = free + step.guidance * (velocity - free)
        else:
            velocity = model(latent, step.timestep, text, frames)
        if check:
            check()
        if (changed := on_step(step, sample, velocity)) is not None:
            velocity = changed
        sample = _pin(schedule.step(velocity, index, sample), pinned)
        check = _check_finite(sample, f"step {index + 1} of {len(steps)} ({step})")
    assert check, "a plan has steps"
    check()
    return sample


def _check_finite(sample: Tensor, after: str) -> Callable[[], None]:
    """JobError if `sample` has NaN or Inf: at once, or on CUDA when the returned function is called.
    That function waits for the work issued up to here, and for nothing later."""
    finite = torch.isfinite(sample).all()
    accelerator = Accelerator(sample.device)
    if accelerator.has_memory:
        finite = finite.to("cpu", non_blocking=True)  # into pinned memory
    arrived = accelerator.record_event()

    def check() -> None:
        if arrived is not None:
            arrived.synchronize()
        if not finite:
            raise JobError(f"the latent has NaN or Inf after {after}; on a GPU try another --attention")

    if arrived is None:
        check()
    return check


def _pin(sample: Tensor, frame: Tensor | None) -> Tensor:
    return sample if frame is None else torch.cat([frame, sample[:, frame.shape[1] :]], dim=1)


def make_schedule(sampling: Sampling, draw: Draw | None = None, first_step: int = 0) -> Schedule:
    """Return a fresh schedule, for one video, from `first_step` on.
    draw: source of its noise; without it only the timesteps are of use."""
    timesteps, steps, shift = sampling.timesteps, sampling.steps, sampling.shift
    if sampling.solver in ("euler", "dmd"):
        sigmas = (spaced(steps, shift) if timesteps is None else levels_at(timesteps))[first_step:]
        return EulerSchedule(sigmas) if sampling.solver == "euler" else RenoisingSchedule(sigmas, draw)
    if timesteps is not None:
        levels, shift = np.array(timesteps) / TRAIN_TIMESTEPS, 1.0
    else:  # the original's grid for UniPC starts at the largest training level, 0.999 in float32
        first = float(np.float32(0.999)) if sampling.solver == "unipc" else 1.0
        levels = np.linspace(first, 0.0, steps + 1)[:-1]
    return _LibrarySchedule(sampling.solver, levels[first_step:], shift)


def spaced(steps: int, shift: float) -> np.ndarray:
    """Evenly spaced levels u, shifted to sigma = s u / (1 + (s - 1) u) (SD3, arXiv 2403.03206, eq. 23)."""
    u = np.linspace(TRAIN_TIMESTEPS, 0, steps + 1, dtype=np.float32) / np.float32(TRAIN_TIMESTEPS)
    return np.asarray(np.float32(shift) * u / (1 + np.float32(shift - 1) * u))


def levels_at(timesteps: Sequence[float]) -> np.ndarray:
    """The levels of exactly these (final, already shifted) timesteps, and 0."""
    return np.array([*timesteps, 0.0], dtype=np.float32) / np.float32(TRAIN_TIMESTEPS)


class EulerSchedule:
    """Explicit Euler over falling noise levels, float32 [n + 1], the last of which is 0; n timesteps, unrounded."""

    noise_scale = 1.0  # of the noise that the video starts as

    def __init__(self, sigmas: np.ndarray) -> None:
        self.sigmas = sigmas.astype(np.float32)
        self.timesteps: list[float] = (self.sigmas[:-1] * np.float32(TRAIN_TIMESTEPS)).tolist()

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """From level `index` to the next: float32 tensors of one shape."""
        return sample + float(self.sigmas[index + 1] - self.sigmas[index]) * velocity


class RenoisingSchedule(EulerSchedule):
    """Each step goes all the way to the predicted clean latent and comes back with fresh noise ("dmd").

        x0 = x - sigma v;   x_next = (1 - sigma_next) x0 + sigma_next eps;   the last step ends at x0

    How models distilled by distribution matching are sampled (DMD2, arXiv 2405.14867; rCM, arXiv 2510.08431). eps is
    drawn in the order of the steps from the generator that gave the initial noise, so a seed names a video.
    """

    def __init__(self, sigmas: np.ndarray, draw: Draw | None) -> None:
        super().__init__(sigmas)
        self.noise_scale = float(self.sigmas[0])
        self.draw = draw

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean, after = sample - float(self.sigmas[index]) * velocity, float(self.sigmas[index + 1])
        if not after:
            return clean
        assert self.draw is not None, "a schedule made without a source of noise cannot take steps"
        return (1 - after) * clean + after * self.draw(clean.shape)


class _LibrarySchedule:
    """A multistep scheduler of diffusers. Its timesteps are integers, 1000 sigma rounded down as in the original."""

    noise_scale = 1.0

    def __init__(self, solver: str, levels: np.ndarray, shift: float) -> None:
        """solver: UniPC (arXiv 2302.04867), order 2, B2(h), predicting x0; else DPM-Solver++ (arXiv 2211.01095)."""
        sigmas = shift * levels / (1 + (shift - 1) * levels)
        if solver == "unipc" and sigmas[0] > 1 - 1e-6:  # as the library does, which takes log(1 - sigma)
            sigmas[0] -= 1e-6
        self.solver = solver
        self.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
        self.timesteps = np.floor(sigmas * TRAIN_TIMESTEPS).tolist()

    @cached_property
    def scheduler(self) -> Any:
        """Made for the first step: importing it takes as long as torch, which a plan need not wait for."""
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

        made = (UniPCMultistepScheduler if self.solver == "unipc" else DPMSolverMultistepScheduler)(**FLOW)
        made.set_timesteps(len(self.timesteps))  # levels of its own, which are overwritten
        made.sigmas, made.timesteps = self.sigmas, torch.tensor(self.timesteps, dtype=torch.int64)
        made.set_begin_index(0)  # else it searches its index by value, and fails on two equal timesteps
        return made

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        timestep = self.scheduler.timesteps[index]
        return self.scheduler.step(velocity, timestep, sample, return_dict=False)[0]
