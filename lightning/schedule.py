"""The guidance-free schedules of the distilled models: a few steps along the flow-matching ODE, or across it.

x_sigma = (1 - sigma) x0 + sigma noise, the network predicts v = noise - x0, so dx/dsigma = v and x0 = x - sigma v
(Lipman et al., arXiv 2210.02747); timestep = 1000 sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from wan.configs.task import TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[Sequence[int]], "Tensor"]  # shape -> the next standard normal numbers of the video's generator


def spaced(steps: int, shift: float) -> np.ndarray:
    """Evenly spaced levels u, shifted to sigma = s u / (1 + (s - 1) u) (SD3, arXiv 2403.03206, eq. 23)."""
    u = np.linspace(TRAIN_TIMESTEPS, 0, steps + 1, dtype=np.float32) / np.float32(TRAIN_TIMESTEPS)
    return np.asarray(np.float32(shift) * u / (1 + np.float32(shift - 1) * u))


def levels_at(timesteps: Sequence[float]) -> np.ndarray:
    """The levels of exactly these (final, already shifted) timesteps, and 0."""
    return np.array([*timesteps, 0.0], dtype=np.float32) / np.float32(TRAIN_TIMESTEPS)


class EulerSchedule:
    """Explicit Euler over falling noise levels, the last of which is 0.

    sigmas: float32 [n + 1]; timesteps: n floats, visited in order and given to the network unrounded.
    """

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
        """draw may be None where only the timesteps are wanted."""
        super().__init__(sigmas)
        self.noise_scale = float(self.sigmas[0])
        self.draw = draw

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean, after = sample - float(self.sigmas[index]) * velocity, float(self.sigmas[index + 1])
        if not after:
            return clean
        assert self.draw is not None, "a schedule made without a source of noise cannot take steps"
        return (1 - after) * clean + after * self.draw(clean.shape)
