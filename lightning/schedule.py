"""The guidance-free Euler schedule of the distilled models: a few steps of the flow-matching ODE.

x_sigma = (1 - sigma) x0 + sigma noise, the network predicts v = noise - x0, so dx/dsigma = v (Lipman et al.,
arXiv 2210.02747); timestep = 1000 sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

TRAIN_TIMESTEPS = 1000


class EulerSchedule:
    """Explicit Euler over falling noise levels, the last of which is 0.

    sigmas: float32 [n + 1]; timesteps: n floats, visited in order and given to the network unrounded.
    """

    def __init__(self, sigmas: np.ndarray) -> None:
        self.sigmas = sigmas.astype(np.float32)
        self.timesteps: list[float] = (self.sigmas[:-1] * np.float32(TRAIN_TIMESTEPS)).tolist()

    @classmethod
    def spaced(cls, steps: int, shift: float) -> EulerSchedule:
        """Evenly spaced levels u, shifted to sigma = s u / (1 + (s - 1) u) (SD3, arXiv 2403.03206, eq. 23)."""
        u = np.linspace(TRAIN_TIMESTEPS, 0, steps + 1, dtype=np.float32) / np.float32(TRAIN_TIMESTEPS)
        return cls(np.float32(shift) * u / (1 + np.float32(shift - 1) * u))

    @classmethod
    def at(cls, timesteps: Sequence[float]) -> EulerSchedule:
        """Exactly these (final, already shifted) timesteps."""
        return cls(np.array([*timesteps, 0.0], dtype=np.float32) / np.float32(TRAIN_TIMESTEPS))

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """From level `index` to the next: float32 tensors of one shape."""
        return sample + float(self.sigmas[index + 1] - self.sigmas[index]) * velocity
