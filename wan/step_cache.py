"""The step cache: steps of a long schedule are skipped while their velocity would change little.

Shapes: C latent channels, f, h, w latent frames, rows, columns. A guided step has two passes, [2, C, f, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from wan.sampling import Denoisers, Step

FIRST, AFTER_CHANGE = 7, 2  # steps always computed: of the video, and after a change of expert


class StepCache:
    """Wraps the networks of one video, one call for each step (EasyCache, arXiv 2507.02860).

    A skipped step's v is x + (v_last - x_last) of the last computed one. Steps are skipped while the sum of
    k |x - x_before| / |v_last| over them is below `limit`; k = |v - v'| / |x - x'| of the last two computed steps,
    v of the first pass, |.| a mean of magnitudes. same: gives all ranks rank 0's tensor, so that they decide alike.
    """

    def __init__(self, inner: Denoisers, steps: Sequence[Step], limit: float, same: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.limit, self.same = inner, limit, same
        self.made: list[bool] = []  # of each step so far, whether it was computed
        self._always = always_computed(steps)
        self._x = self._last_x = self._last_v = self._slope = self._change = Tensor()

    def ready(self, name: str, lora: float) -> Callable[..., Tensor]:
        """The next step's network, or its substitute."""

        def forward(latent: Tensor, *inputs: object) -> Tensor:
            if len(self.made) + 1 not in self._always:
                x = latent[: self._x.shape[0]]
                change = self._slope * _size(x - self._x) / _size(self._last_v)
                self._x, self._change = x, self.same(self._change + change)
                if self._change < self.limit:
                    self.made.append(False)
                    return self._x + (self._last_v - self._last_x)
            velocity = self.inner.ready(name, lora)(latent, *inputs)
            self._keep(latent[: velocity.shape[-4]], velocity)
            return velocity

        return forward

    def _keep(self, x: Tensor, v: Tensor) -> None:
        if self.made:
            self._slope = _size(v - self._last_v) / _size(x - self._last_x)
        self.made.append(True)
        self._x, self._last_x, self._last_v, self._change = x, x.clone(), v, x.new_zeros(())  # OnStep may change x


def always_computed(steps: Sequence[Step]) -> set[int]:
    """Numbers of the steps that are never skipped: the first ones, the last, and those after a change of network."""
    networks = [(step.expert, step.lora, step.guided) for step in steps]
    changes = [index for index in range(1, len(steps)) if networks[index] != networks[index - 1]]
    return {*range(1, 1 + FIRST), *(index + n for index in changes for n in range(1, 1 + AFTER_CHANGE)), len(steps)}


def _size(x: Tensor) -> Tensor:
    """Mean magnitude, of two passes the conditional one's."""
    return (x[0] if x.ndim == 5 else x).abs().mean()
